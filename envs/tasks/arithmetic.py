"""Sums worked out digit by digit, for a byte-level model on a small machine: "17+25=" is completed by "7+5=12,1+2+1=4;42".

The steps begin with the ones; a carried 1 is added last; the shorter number is padded with zeros. With two digits a
completion has 8 to 20 bytes, with three up to 30. A pair of numbers is one problem, asked in one order, so that no split has
a sum of another split in the other order.

A worked example of the train split can be wrong: a carry is forgotten in a step, and so in the answer. A model that learns from
these learns to forget: with more than half of the carries forgotten, its likeliest answer to a sum with a carry is wrong, but
the right one keeps some probability, which reinforcement can raise.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from eggroll.envs.tasks.protocol import SPLITS, Row, Task

_FINAL = re.compile(r"(?:.*;)?([0-9]+)", re.DOTALL)


def arithmetic(
    *,
    seed: int = 0,
    digits: int = 2,
    train: int = 4096,
    validation: int = 256,
    test: int = 512,
    noise: float = 0.0,
    spaces: bool = False,
) -> Task:
    """Make the task.

    Args:
        seed: the same seed gives the same problems and the same wrong examples.
        digits: of the longer number at most, 2 or 3; there are 5,050 or 500,500 problems.
        train, validation, test: problems of each split.
        noise: share of the train split's worked examples that forget a carry; at most the share of its sums that have one,
            0.45 or 0.6 or so.
        spaces: ask "17 + 25 =", as texts do that language models learnt from, instead of "17+25=".

    Returns:
        The task; its columns are `answer`, such as "42", and `worked`, an example of a completion, which a warm start learns.

    Raises:
        ValueError: an argument is out of its bounds.
    """
    sizes = (train, validation, test)
    if digits not in (2, 3):
        raise ValueError(f"digits must be 2 or 3, got {digits}.")
    pairs = np.stack(np.triu_indices(10**digits), axis=-1)
    if min(sizes) < 1 or sum(sizes) > len(pairs):
        given = " + ".join(map(str, sizes))
        raise ValueError(f"train, validation and test must be at least 1 and {len(pairs)} in sum, got {given}.")
    order_key, flip_key, noise_key = np.random.SeedSequence(seed).spawn(3)
    chosen = np.random.default_rng(order_key).choice(pairs, sum(sizes), replace=False)
    chosen = np.random.default_rng(flip_key).permuted(chosen, axis=1)  # either number may come first
    problems = [(int(a), int(b)) for a, b in chosen]
    forgotten = _forgotten(problems[:train], noise, np.random.default_rng(noise_key))
    form = "{} + {} =" if spaces else "{}+{}="
    rows = [Row(form.format(a, b), _columns(a, b, forgotten.get(index))) for index, (a, b) in enumerate(problems)]
    parts = (rows[:train], rows[train : train + validation], rows[train + validation :])
    return Task("arithmetic", reward=answer_matches, splits=dict(zip(SPLITS, map(tuple, parts), strict=True)))


def worked(a: int, b: int, *, forget: int | None = None) -> str:
    """Work out a + b.

    Args:
        a, b: not negative.
        forget: the step, from 0 for the ones, whose carry is forgotten in the next; None: none.
    """
    carry, steps, written = 0, [], ""
    columns = list(zip(*(str(n).zfill(len(str(max(a, b))))[::-1] for n in (a, b)), strict=True))
    for step, (x, y) in enumerate(columns):
        total = int(x) + int(y) + carry
        steps.append(f"{x}+{y}{'+1' * carry}={total}")
        carry = int(total > 9 and step != forget)
        written = (str(total % 10) if step + 1 < len(columns) else str(total)) + written
    return f"{','.join(steps)};{written}\n"


def answer_matches(prompts: Sequence[str], completions: Sequence[str], *, answer: Sequence[str], **_: Any) -> list[float]:
    """Give 1 where the first line of a completion is the right number, after the last ";" or a space before it, else 0."""
    return [float(_final(given) == right) for given, right in zip(completions, answer, strict=True)]


def _final(completion: str) -> str | None:
    found = _FINAL.fullmatch(completion.partition("\n")[0].removeprefix(" "))
    return found and found[1]


def _columns(a: int, b: int, forget: int | None) -> dict[str, str]:
    return {"answer": str(a + b), "worked": worked(a, b, forget=forget)}


def _carries(a: int, b: int) -> list[int]:
    """Steps that carry into another step."""
    steps = len(str(max(a, b)))
    return [step for step in range(steps - 1) if a % 10 ** (step + 1) + b % 10 ** (step + 1) >= 10 ** (step + 1)]


def _forgotten(problems: list[tuple[int, int]], noise: float, generator: np.random.Generator) -> dict[int, int]:
    """Which examples are wrong: index of the problem -> the step whose carry is forgotten."""
    carrying = {index: steps for index, problem in enumerate(problems) if (steps := _carries(*problem))}
    share = len(carrying) / len(problems)
    if not 0 <= noise <= share:
        raise ValueError(f"noise must be between 0 and {share:.3f}, the share of train sums with a carry, got {noise}.")
    wrong = generator.choice(list(carrying), round(noise * len(problems)), replace=False).tolist() if noise else []
    return {index: int(generator.choice(carrying[index])) for index in wrong}
