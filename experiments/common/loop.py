"""The training loop of backprop baselines, and what every run shares: checks on validation examples, the reader of metrics.

Evolution strategies and zeroth-order methods train with `eggroll.train`.
"""

import contextlib
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax

from eggroll.devices.processes import is_first
from eggroll.experiments.common.run import jsonable
from eggroll.runs.progress import progress_line
from eggroll.runs.training import open_metrics

Row = dict[str, Any]
Run = TypeVar("Run")  # parameters, optimizer state and the like


class Tuned(NamedTuple):
    """Result of a run of any recipe."""

    params: Any
    steps: int
    forwards: int  # passes of a batch
    skipped: int  # steps that changed nothing, because no loss was finite
    forwards_per_second: float  # of the median step; NaN where no step was left


class Checks:
    """The steps after which the unperturbed parameters are scored on the validation examples.

    Args:
        steps: of the run.
        checks: about how many; the last step always has one.
    """

    def __init__(self, *, steps: int, checks: int):
        self._steps, self._every = steps, math.ceil(steps / checks)

    def due(self, done: int) -> bool:
        """Return whether to check after `done` steps."""
        return done % self._every == 0 or done == self._steps


def run_steps(
    advance: Callable[[Run, int], tuple[Run, Row]],
    run: Run,
    *,
    steps: int,
    folder: Path,
    callbacks: Sequence[Callable[[Run, Row], bool | None]] = (),
) -> tuple[Run, list[Row]]:
    """Run the steps of a baseline, with a progress line and a line of `metrics.jsonl` for each.

    Args:
        advance: `advance(run, number) -> (next run, row)`; the row has the fields of step `number`, "loss" among them.
        run: the initial one.
        steps: how many.
        folder: gets `metrics.jsonl`.
        callbacks: each is called as `callback(run, row)` after every step and may add fields to the row; True stops.

    Returns:
        `(run, rows)`; "generation" and "seconds", without callbacks, are in every row too.
    """
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open_metrics(folder, 0)) if is_first() else None
        show = stack.enter_context(progress_line("steps", steps, enabled=None if is_first() else False))
        for number in range(steps):
            start = time.perf_counter()
            run, row = jax.block_until_ready(advance(run, number))
            rows.append({"generation": number} | row | {"seconds": time.perf_counter() - start})
            stops = [bool(callback(run, rows[-1])) for callback in callbacks]
            if file is not None:
                file.write(json.dumps(jsonable(rows[-1])) + "\n")
                file.flush()
            show(number + 1, f"loss {float(rows[-1]['loss']):.4g}")
            if any(stops):
                break
    return run, rows


def rate(seconds: Sequence[float], *, forwards: int) -> float:
    """Forwards per second of the median step."""
    return forwards / statistics.median(seconds) if seconds else math.nan


def read_metrics(folder: Path) -> list[Row]:
    """Read the lines of `metrics.jsonl`, without one truncated by a kill; none where there is no such file."""
    path, rows = folder / "metrics.jsonl", list[Row]()
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows
