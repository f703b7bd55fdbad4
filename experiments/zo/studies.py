"""What the suite tunes a real model on: two tasks, one of them also by a metric that has no gradient.

movies            sentences of movie reviews (`data.movies`): "... It was" + " great" | " terrible"
movies-accuracy   the same; what is improved is the accuracy itself
sums              generation: the answer to a sum of two-digit numbers after one worked example
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eggroll.envs.tasks.arithmetic import arithmetic
from eggroll.experiments.zo.config import BACKPROP
from eggroll.experiments.zo.data.movies import read_movies

Records = Sequence[dict[str, Any]]

RECIPES = {  # name in the table -> options
    "mezo": ("--recipe", "mezo", "--perturbation", "normal"),
    "mezo-rademacher": ("--recipe", "mezo", "--perturbation", "rademacher"),
    "lozo": ("--recipe", "lozo"),
    BACKPROP: ("--recipe", BACKPROP),
    "fzoo": ("--recipe", "fzoo"),
    "adamezo": ("--recipe", "adamezo"),
    "grzo": ("--recipe", "grzo"),
    "lozo_m": ("--recipe", "lozo_m"),
    "spsa15": ("--recipe", "spsa15"),
}
RATES = {  # the middle of the rates that a search tries, for models of about 100 M parameters and tens of steps
    "mezo": 5e-5,
    "mezo-rademacher": 5e-5,
    "lozo": 5e-5,
    BACKPROP: 2e-5,
    "fzoo": 1e-3,
    "adamezo": 1e-4,
    "grzo": 3e-6,
    "lozo_m": 5e-5,
    "spsa15": 5e-5,
}


def _sums() -> Records:
    splits = arithmetic(seed=0, spaces=True).splits
    return [{"prompt": row.prompt, "answer": row.columns["answer"]} for split in splits.values() for row in split]


class Study(NamedTuple):
    """A task, and what is improved."""

    task: str  # studies of the same task share their data
    records: Callable[[], Records]
    options: tuple[str, ...]  # of experiments.zo
    objective: str = "loss"

    def arguments(self, data: Path) -> tuple[str, ...]:
        """The options of experiments.zo that make the task out of a folder of data."""
        return (*self.options, "--objective", self.objective, "--data", str(data))


_MOVIES = ("--task", "sst2", "--max-length", "48")
STUDIES = {
    "movies": Study("sentences", read_movies, _MOVIES),
    "movies-accuracy": Study("sentences", read_movies, (*_MOVIES, "--sigma", "0.003"), "accuracy"),
    "sums": Study("sums", _sums, ("--template", "12 + 35 = 47\n{prompt}", "--answer", " {answer}", "--max-length", "48")),
}


def write_splits(records: Records, folder: Path, *, validation: int, test: int, written: int) -> None:
    """Write train.jsonl, validation.jsonl and test.jsonl, without common records; all that is not held out is for training.

    Args:
        records: in any order; which part gets a record does not depend on the folder.
        folder: created if missing.
        validation, test: records that are held out.
        written: of the test records.

    Raises:
        ValueError: nothing is held out, or nothing would be left for training.
    """
    if min(validation, test) < 1 or validation + test >= len(records):
        raise ValueError(
            f"validation and test must be at least 1 and less than {len(records)} in sum, got {validation}, {test}."
        )
    mixed = [records[index] for index in np.random.default_rng(0).permutation(len(records))]
    held = {"validation": mixed[:validation], "test": mixed[validation:][:written]}
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in {"train": mixed[validation + test :], **held}.items():
        lines = "".join(json.dumps(record) + "\n" for record in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
