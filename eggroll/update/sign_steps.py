"""Steps of one integer where an update is large for its tensor: the rule of the EGGROLL paper for quantised weights.

    z = (u - mean(u)) / (std(u) + 1e-8)        over the entries of one tensor
    step = sign(z) where |z| >= threshold, else 0

(arXiv 2511.16652, version 2, section 6.4: u is Adam's update, the new weight is clip(Q + step).) Parameters are not needed, and
nothing is kept between generations.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

EPSILON = 1e-8  # added to the standard deviation


def standardised_sign(threshold: float) -> optax.GradientTransformation:
    """Make the transformation that turns updates into steps of -1, 0 and 1.

    It keeps the direction of what it gets, so an optimizer ends in a negation as any other does:
    `optax.chain(optax.scale_by_adam(), eggroll.standardised_sign(2.0), optax.scale(-1.0))`. Entries that are all equal stay.

    Args:
        threshold: least |z| of an entry that moves, >= 0; of normal updates 2.0 moves one in 22, 3.0 one in 370.

    Raises:
        ValueError: `threshold` is negative or not a finite number.
    """
    if not (isinstance(threshold, int | float) and 0 <= threshold < math.inf):
        raise ValueError(f"threshold must be a finite number >= 0, got {threshold!r}.")

    def init(params: Any) -> optax.EmptyState:
        return optax.EmptyState()

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        return jax.tree.map(lambda u: _steps(u, threshold), updates), state

    return optax.GradientTransformation(init, update)


def _steps(u: Array, threshold: float) -> Array:
    wide = u.astype(jnp.float32)
    z = (wide - jnp.mean(wide)) / (jnp.std(wide) + EPSILON)
    return jnp.where(jnp.abs(z) >= threshold, jnp.sign(z), 0).astype(u.dtype)
