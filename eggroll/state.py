"""`ESState`: everything a run needs to go on."""

from typing import Any, NamedTuple

from jax import Array

Masters = tuple[Array | None, ...]  # float32 copies of short parameters, in leaf order


class ESState(NamedTuple):
    """State of a run: a pytree that jits, scans and saves as it is."""

    params: Any  # the user's pytree, in its storage dtypes
    opt_state: Any  # of the optax transformation, float32
    key: Array  # typed threefry key of the run, never changes
    generation: Array  # int32 []
    sigma: Array  # float32 [], standard deviation of the next generation
    masters: Masters  # float32 copies of low-precision parameters, or None
    member_state: Any  # [P, 2, ...] carried per member, or None
