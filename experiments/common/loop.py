"""What runs under `eggroll.train` share: when to check on validation examples, their result, and how long they took."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eggroll.devices.processes import is_first
from eggroll.runs.metrics import read_metrics


class Tuned(NamedTuple):
    """Result of a run of any recipe."""

    params: Any
    steps: int
    forwards: int  # passes of a batch
    skipped: int  # steps that changed nothing, because no loss was finite
    forwards_per_second: float  # of the median step; NaN where no step was left
    seconds: float  # of training
    ended: str  # which limit ended it: "steps" or "forwards"
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


def seconds_spent(folder: Path) -> float:
    """Return the seconds of training that the run in a folder took so far, by its metrics; 0 for a new one.

    Where they have those of every generation alone, compilation counts, and checks do not.
    """
    rows = read_metrics(folder)
    return rows[-1].get("seconds_spent") or sum(row.get("seconds", 0.0) for row in rows) if rows else 0.0


def print_end(done: str, reason: str, *, seconds: float) -> None:
    """Print after what a run ended, such as "6 steps", and which limit ended it."""
    if is_first():
        print(f"ended after {done} and {seconds:.0f} s of training: {reason}", flush=True)


def rate(seconds: Sequence[float], *, forwards: int) -> float:
    """Forwards per second of the median step."""
    return forwards / statistics.median(seconds) if seconds else math.nan
