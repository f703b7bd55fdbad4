"""Schedules of a number, such as sigma or a step size, over the generations of a run.

exponential   first * decay^t
linear        a line from first to first * end
cosine        half a wave between the same
"""

from collections.abc import Callable
from typing import Any, Literal

import optax

Rate = float | Callable[[Any], Any]  # a number, or a function of the generation
Kind = Literal["exponential", "linear", "cosine"]


def make_schedule(kind: Kind, first: float, *, decay: float, end: float, generations: int) -> Rate:
    """Make a schedule, a function of the generation t = 0, 1, ...

    Args:
        kind: see above.
        first: value of the first generation.
        decay: factor per generation, of exponential ones.
        end: value of the last generation over that of the first one, of the others; later generations keep it.
        generations: of the run, at least 2 for linear and cosine ones.

    Returns:
        The schedule; `first` itself where nothing changes.
    """
    if kind == "exponential":
        return first if decay == 1 else optax.exponential_decay(first, 1, decay)
    if kind == "linear":
        return optax.linear_schedule(first, first * end, generations - 1)
    return optax.cosine_decay_schedule(first, generations - 1, end)
