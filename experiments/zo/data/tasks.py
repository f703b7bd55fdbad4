"""Tasks: turn a record into a prompt and the continuations of it to compare.

classification   "a fine film It was" + " great" | " terrible"      one candidate a label word
generation       "3 + 4 =" + " 7"                                   the answer alone
"""

import dataclasses
import string
from collections.abc import Mapping
from typing import NamedTuple

from eggroll.envs.tasks.records import Record


class Question(NamedTuple):
    """A record as text: the prompt, its candidate continuations, and the index of the right one."""

    prompt: str
    candidates: tuple[str, ...]
    label: int


@dataclasses.dataclass(frozen=True)
class Classification:
    """Choose the label whose word continues the prompt best.

    Args:
        template: prompt with the record's fields in braces, such as "{text} It was".
        label_words: label in the file -> its word, with the space that it starts with, such as {"0": " terrible"}.
        label_field: field of the label.
    """

    template: str
    label_words: Mapping[str, str]
    label_field: str = "label"

    def __post_init__(self):
        _fields(self.template)
        if len(self.label_words) < 2:
            raise ValueError(f"label_words must name two labels or more, got {dict(self.label_words)}.")

    def question(self, record: Record) -> Question:
        """Return the record as text.

        Raises:
            ValueError: a missing field, or a label without a word.
        """
        label, labels = record.text(self.label_field), list(map(str, self.label_words))
        if label not in labels:
            raise ValueError(f"{record.place}: label '{label}' is unknown, expected one of {', '.join(labels)}.")
        return Question(_fill(self.template, record), tuple(self.label_words.values()), labels.index(label))


@dataclasses.dataclass(frozen=True)
class Generation:
    """Write the answer.

    Args:
        template: prompt with the record's fields in braces.
        answer: the expected continuation, in the same form; include the end of an answer, such as "{answer}</s>".
    """

    template: str = "{prompt}"
    answer: str = "{answer}"

    def __post_init__(self):
        _fields(self.template)
        _fields(self.answer)

    def question(self, record: Record) -> Question:
        """Return the record as text.

        Raises:
            ValueError: a missing field.
        """
        return Question(_fill(self.template, record), (_fill(self.answer, record),), 0)


Task = Classification | Generation


def _fields(template: str) -> list[str]:
    """Return the names of the fields of a template."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"template {template!r} is not well formed: {error}.") from None
    if not names or "" in names:
        raise ValueError(f"template {template!r} must name fields in braces, such as '{{text}}'.")
    try:
        template.format(**dict.fromkeys(names, ""))
    except (LookupError, AttributeError):  # "{a.b}", "{a:{b}}"
        raise ValueError(f"template {template!r} must name fields of a line and nothing within them.") from None
    except ValueError as error:
        raise ValueError(f"template {template!r} is not well formed: {error}.") from None
    return names


def _fill(template: str, record: Record) -> str:
    return template.format(**{name: record.text(name) for name in _fields(template)})


SST2 = Classification("{text} It was", {"0": " terrible", "1": " great"})
RTE = Classification('{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n', {"0": "Yes", "1": "No"})
