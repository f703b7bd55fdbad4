"""What runs under `eggroll.train` share: when to check on validation examples, their result."""

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple


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


def rate(seconds: Sequence[float], *, forwards: int) -> float:
    """Forwards per second of the median step."""
    return forwards / statistics.median(seconds) if seconds else math.nan
