"""Countdown in one line, for small language models: "numbers 3, 8 target 11:" is completed by " 3 + 8".

The answer has every number once, joined by + or -, and the value of the target; for most problems it is one choice of order
and signs out of several. The data set "countdown" of reasoning-gym asks the same in 100 to 200 tokens.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from eggroll.envs.tasks.protocol import SPLITS, Row, Task

_SUM = re.compile(r" ?[0-9]+(?: ?[+-] ?[0-9]+)*")
_TRIES = 10  # draws for every problem that is asked for


def short_countdown(
    *, seed: int = 0, numbers: int = 2, largest: int = 99, train: int = 2048, validation: int = 256, test: int = 512
) -> Task:
    """Make the task.

    Args:
        seed: the same seed gives the same problems.
        numbers: of a problem, from 2 to 4.
        largest: of the numbers, which begin with 1.
        train, validation, test: problems of each split. No two have the same numbers, in whatever order, and target.

    Returns:
        The task; its columns are `numbers` and `target`.

    Raises:
        ValueError: an argument is out of its bounds, or there are too few problems.
    """
    sizes = (train, validation, test)
    if not 2 <= numbers <= 4:
        raise ValueError(f"numbers must be between 2 and 4, got {numbers}.")
    if min(sizes) < 1 or largest < 2:
        raise ValueError(f"train, validation and test must be at least 1, and largest at least 2, got {sizes} and {largest}.")
    generator, found = np.random.default_rng(seed), dict[tuple, Row]()
    for _ in range(_TRIES * sum(sizes)):
        given = generator.integers(1, largest + 1, numbers)
        target = int(given[0] + (given[1:] * generator.choice([-1, 1], numbers - 1)).sum())
        if target > 0:
            row = _ask(generator.permutation(given).tolist(), target)
            found.setdefault((*sorted(row.columns["numbers"]), target), row)
        if len(found) == sum(sizes):
            break
    else:
        asked = " + ".join(map(str, sizes))
        raise ValueError(f"{numbers} numbers up to {largest} gave {len(found)} problems, fewer than {asked}: raise largest.")
    rows = tuple(found.values())
    parts = (rows[:train], rows[train : train + validation], rows[train + validation :])
    return Task("short_countdown", reward=reaches_target, splits=dict(zip(SPLITS, parts, strict=True)))


def _ask(numbers: list[int], target: int) -> Row:
    return Row(f"numbers {', '.join(map(str, numbers))} target {target}:", {"numbers": numbers, "target": target})


def reaches_target(
    prompts: Sequence[str], completions: Sequence[str], *, numbers: Sequence[list[int]], target: Sequence[int], **_: Any
) -> list[float]:
    """Give 1 where the first line of a completion joins the numbers by + and - to the target, else 0."""
    return [float(_is_right(*given)) for given in zip(completions, numbers, target, strict=True)]


def _is_right(completion: str, numbers: list[int], target: int) -> bool:
    answer = completion.partition("\n")[0].rstrip(" ")
    used = re.findall(r"[0-9]+", answer)
    if not _SUM.fullmatch(answer) or sorted(used) != sorted(map(str, numbers)):  # as texts: a number may have any length
        return False
    signs = [1, *(1 if sign == "+" else -1 for sign in re.findall(r"[+-]", answer))]
    return sum(sign * int(number) for sign, number in zip(signs, used, strict=True)) == target
