"""What every fine-tuning run has in common: checks on validation examples, a line of metrics a step, a figure."""

import contextlib
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from eggroll.devices.processes import is_first
from eggroll.experiments.common.run import jsonable
from eggroll.runs.progress import progress_line
from eggroll.runs.training import open_metrics

Row = dict[str, Any]


class Tuned(NamedTuple):
    """What a run of any recipe ends with."""

    params: Any
    steps: int
    forwards: int  # passes of a batch
    skipped: int  # steps that changed nothing, because no loss was finite
    forwards_per_second: float  # of the median step; NaN where none was left to do


class Checks:
    """Says when the unperturbed parameters are scored on the validation examples.

    Args:
        steps: of the run.
        checks: about how many; the last step always has one.
    """

    def __init__(self, *, steps: int, checks: int):
        self._steps, self._every = steps, math.ceil(steps / checks)

    def due(self, done: int) -> bool:
        """Whether there is one after so many steps."""
        return done % self._every == 0 or done == self._steps


def run_steps(step: Callable[[int], Row], *, first: int, steps: int, folder: Path) -> list[Row]:
    """Run steps one by one, with a progress line and a line of metrics for each.

    Args:
        step: does step number `first`, `first` + 1, ... and returns its fields, "loss" and "seconds" among them.
        first: steps that are done already.
        steps: of the whole run.
        folder: of the run.
    """
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open_metrics(folder, first)) if is_first() else None
        show = stack.enter_context(progress_line("steps", steps, enabled=None if is_first() else False))
        for number in range(first, steps):
            rows.append({"generation": number} | step(number))
            if file is not None:
                file.write(json.dumps(jsonable(rows[-1])) + "\n")
                file.flush()
            show(number + 1, f"loss {rows[-1]['loss']:.4g}")
    return rows


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """Call, wait for the result, and tell the seconds."""
    start = time.perf_counter()
    result = jax.block_until_ready(function())
    return result, time.perf_counter() - start


def rate(seconds: Sequence[float], *, forwards: int) -> float:
    """Forwards per second of the median step."""
    return forwards / statistics.median(seconds) if seconds else math.nan


def read_metrics(folder: Path) -> list[Row]:
    """The lines of a run's metrics, without one that a kill cut off."""
    path, rows = folder / "metrics.jsonl", list[Row]()
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows
