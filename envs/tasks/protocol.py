"""Tasks for language models: prompts with columns, a verifiable reward, and splits that share no prompt.

A reward is called as TRL calls it, by keyword:

    reward(prompts=prompts, completions=completions, **columns) -> list[float | None]

Texts in, one number per completion, higher is better; None abstains: the completion has no score. A column is a list with one
entry per completion, such as `answer`; a reward names what it reads and takes the rest in `**kwargs`, such as
`def reward(completions, answer, **kwargs)`. `async def` works as well. A prompt is the plain question; a chat template is up to
the caller.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from eggroll.envs.tasks.calls import Reward
from eggroll.envs.tasks.rewards import check_reward

SPLITS = ("train", "validation", "test")


class Row(NamedTuple):
    """One problem: its prompt, and what the reward needs to judge a completion."""

    prompt: str
    columns: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A task with a verifiable reward.

    Args:
        name: in the registry.
        reward: `reward(prompts=, completions=, **columns) -> list[float | None]`.
        splits: rows of "train", "validation" and "test". Tuples are checked to share no prompt; a sequence that makes its rows
            lazily must ensure this itself.

    Raises:
        ValueError: two splits share a prompt, or a split is empty; the reward is no function, or does not take prompts,
            completions and the columns of each split's first row by keyword.
    """

    name: str
    _: dataclasses.KW_ONLY
    reward: Reward
    splits: Mapping[str, Sequence[Row]]

    def __post_init__(self):
        for split, rows in self.splits.items():
            if not len(rows):
                raise ValueError(f"split '{split}' of task '{self.name}' has no rows.")
            check_reward(self.reward, rows[0].columns)
        check_disjoint({split: rows for split, rows in self.splits.items() if isinstance(rows, tuple)})

    def split(self, name: str) -> Sequence[Row]:
        """Return the rows of a split.

        Raises:
            ValueError: the task has no such split.
        """
        if name not in self.splits:
            raise ValueError(f"split must be one of {', '.join(self.splits)} of task '{self.name}', got {name!r}.")
        return self.splits[name]


def check_disjoint(splits: Mapping[str, Sequence[Row]]) -> None:
    """Check that no prompt is in two splits; it may be repeated within one.

    Raises:
        ValueError: one is; the message quotes it.
    """
    owner: dict[str, str] = {}
    for split, rows in splits.items():
        for row in rows:
            if owner.setdefault(row.prompt, split) != split:
                raise ValueError(
                    f"splits {owner[row.prompt]} and {split} must not overlap, both have the prompt {row.prompt!r}."
                )


def without(rows: Sequence[Row], *others: Sequence[Row]) -> tuple[Row, ...]:
    """Return the rows whose prompt is in none of the others."""
    taken = {row.prompt for other in others for row in other}
    return tuple(row for row in rows if row.prompt not in taken)


def collate(rows: Sequence[Row]) -> tuple[list[str], dict[str, list]]:
    """Return the prompts of rows, and their columns as lists: the arguments of a reward, besides the completions.

    Raises:
        ValueError: a row lacks a column that another has.
    """
    names = {name: None for row in rows for name in row.columns}
    for row in rows:
        for name in names:
            if name not in row.columns:
                raise ValueError(f"column '{name}' is missing in the row with the prompt {row.prompt!r}, other rows have it.")
    return [row.prompt for row in rows], {name: [row.columns[name] for row in rows] for name in names}
