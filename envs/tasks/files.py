"""Tasks from the user's JSONL files: the format of GSM8K, and mathematics with answers in LaTeX.

Train problems that are in the test file too are dropped, and some of the others are held out for validation.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from eggroll.envs.tasks.answers import last_number
from eggroll.envs.tasks.protocol import Reward, Row, Task, without
from eggroll.envs.tasks.records import Record, read_records
from eggroll.envs.tasks.rewards import math_matches, math_verify, number_matches


def gsm8k(*, train: str | Path, test: str | Path, seed: int = 0, validation: int = 256) -> Task:
    """Read a task in the format of GSM8K: "question", and "answer" that ends in "#### 42".

    Args:
        train, test: JSONL files.
        seed: of the choice of validation problems.
        validation: problems held out from the train file.

    Returns:
        The task; its columns are `answer`, what follows "####", and `worked`, the whole answer.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is empty; a line is malformed, lacks a field or ends in no number; too few problems for `validation`.
    """
    return _task("gsm8k", _gsm8k_row, number_matches, train, test, seed=seed, validation=validation)


def mathematics(*, train: str | Path, test: str | Path, seed: int = 0, validation: int = 256) -> Task:
    r"""Read a task with "problem" and "answer", such as "\\frac{1}{2}", which math-verify compares.

    Args, Returns, Raises:
        as of `gsm8k`, without the column `worked`; ModuleNotFoundError: math-verify is not installed.
    """
    math_verify()
    return _task("math", _math_row, math_matches, train, test, seed=seed, validation=validation)


def _gsm8k_row(record: Record) -> Row:
    text = record.text("answer")
    _, mark, final = text.rpartition("####")
    if not mark or last_number(final) is None:
        raise ValueError(f"{record.place}: field 'answer' must end in '#### ' and a number, got {text[-40:]!r}.")
    return Row(record.text("question"), {"answer": final.strip(), "worked": text})


def _math_row(record: Record) -> Row:
    return Row(record.text("problem"), {"answer": record.text("answer")})


def _task(
    name: str, row: Callable[[Record], Row], reward: Reward, train: Any, test: Any, *, seed: int, validation: int
) -> Task:
    for option, path in (("train", train), ("test", test)):
        if not Path(path).is_file():
            raise FileNotFoundError(f"option {option} of task {name} must be a JSONL file, there is none at {path}.")
    known, held_out = ([row(record) for record in read_records(path)] for path in (train, test))
    usable = list({row.prompt: row for row in without(known, held_out)}.values())  # without repeated problems
    if not 1 <= validation < len(usable):
        raise ValueError(
            f"validation must be between 1 and {len(usable) - 1}, for {train} has {len(usable)} problems that {test}"
            f" lacks, got {validation}."
        )
    order = np.random.default_rng(seed).permutation(len(usable))
    rows = tuple(usable[index] for index in order)
    splits = {"train": rows[validation:], "validation": rows[:validation], "test": tuple(held_out)}
    return Task(name, reward=reward, splits=splits)
