"""What runs under `eggroll.train` share: when to check on validation examples, their result, the reader of their metrics."""

import contextlib
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]


class Tuned(NamedTuple):
    """Result of a run of any recipe."""

    params: Any
    steps: int
    forwards: int  # passes of a batch
    skipped: int  # steps that changed nothing, because no loss was finite
    forwards_per_second: float  # of the median step; NaN where no step was left
    advice: str = ""  # what to change, should nothing have been learned


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
