"""Rewards: the last number, answers compared by math-verify, the form of a completion, weighted sums.

Every reward is a function of this module or an object of one of its classes, so that worker processes can import it.
"""

import dataclasses
import functools
import logging
import math
import re
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

from eggroll.envs.tasks.answers import final_answer, last_number
from eggroll.envs.tasks.calls import Reward, call, check_signature, number


def number_matches(prompts: Sequence[str], completions: Sequence[str], *, answer: Sequence[Any], **_: Any) -> list[float]:
    """Give 1 where the last number of the completion's answer is the last number of `answer`, else 0.

    Raises:
        ValueError: an `answer` has no number.
    """
    return [float(_same_number(given, right)) for given, right in zip(completions, answer, strict=True)]


def _same_number(completion: str, right: Any) -> bool:
    expected = last_number(str(right))
    if expected is None:
        raise ValueError(f"the column 'answer' must have a number, got {str(right)[:40]!r}.")
    return last_number(final_answer(completion)) == expected


def math_matches(prompts: Sequence[str], completions: Sequence[str], *, answer: Sequence[str], **_: Any) -> list[float]:
    """Give 1 where math-verify finds the completion's answer equal to `answer`, in LaTeX or plain, else 0.

    It has no time limit of its own here: that is the scorer's.

    Raises:
        ModuleNotFoundError: math-verify is not installed.
    """
    library = math_verify()
    right = [library.parse(f"${text}$", parsing_timeout=None) for text in answer]
    given = [library.parse(final_answer(text), parsing_timeout=None) for text in completions]
    return [float(library.verify(r, g, timeout_seconds=None)) for r, g in zip(right, given, strict=True)]


@functools.cache
def math_verify() -> ModuleType:
    """Import math-verify.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        import math_verify as library
    except ModuleNotFoundError as error:
        message = f"answers in LaTeX need the module {error.name}; pip install 'math-verify[antlr4-9-3]' installs it."
        raise ModuleNotFoundError(message, name=error.name) from error
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limits, by signals, are off
    return library


def prepare(reward: Reward) -> None:
    """Import what a reward needs, before the time of its calls is counted."""
    if reward is math_matches:
        math_verify()
    for part, _ in reward.parts if isinstance(reward, Weighted) else ():
        prepare(part)


@dataclasses.dataclass(frozen=True)
class Matches:
    """Give 1 where a regular expression matches the whole completion, else 0; a dot matches line ends too.

    Raises:
        ValueError: `pattern` is no regular expression.
    """

    pattern: str

    def __post_init__(self):
        try:
            re.compile(self.pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"pattern must be a regular expression, got {self.pattern!r}: {error}.") from None

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        """Score the completions."""
        pattern = re.compile(self.pattern, re.DOTALL)
        return [float(pattern.fullmatch(completion) is not None) for completion in completions]


_UNTAGGED = r"(?:(?!</?(?:think|answer)>).)*"
# <think>...</think> <answer>...</answer> with nothing before, no tag inside another, and only white space between and after.
THINK_ANSWER = Matches(rf"<think>{_UNTAGGED}</think>\s*<answer>{_UNTAGGED}</answer>\s*")


@dataclasses.dataclass(frozen=True, init=False)
class Weighted:
    """The weighted sum of rewards: `Weighted((number_matches, 1.0), (THINK_ANSWER, 0.1))`.

    A part that abstains from a completion (None) is left out of its sum; where all do, the sum is None. A part that fails makes
    the sum fail.

    Raises:
        ValueError: there is no part, or a weight is not a finite number.
    """

    parts: tuple[tuple[Reward, float], ...]

    def __init__(self, *parts: tuple[Reward, float]):
        if not parts or not all(math.isfinite(weight) for _, weight in parts):
            weights = [weight for _, weight in parts]
            raise ValueError(f"parts must be one (reward, finite weight) or more, got the weights {weights}.")
        object.__setattr__(self, "parts", parts)

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float | None]:
        """Score the completions."""
        values = [call(reward, prompts, completions, columns) for reward, _ in self.parts]
        return [self._sum(row) for row in zip(*values, strict=True)]

    def _sum(self, values: Sequence[Any]) -> float | None:
        terms = [weight * number(value) for (_, weight), value in zip(self.parts, values, strict=True) if value is not None]
        return sum(terms) if terms else None


def check_reward(reward: Reward, columns: Iterable[str]) -> None:
    """Check that a reward, and each part of a weighted one, takes prompts, completions and all columns by keyword.

    Raises:
        InvalidReward: one does not, or is no function.
        ValueError: a column is called "prompts" or "completions".
    """
    columns = tuple(columns)
    check_signature(reward, columns)
    for part, _ in reward.parts if isinstance(reward, Weighted) else ():
        check_reward(part, columns)
