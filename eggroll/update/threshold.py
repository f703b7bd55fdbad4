"""The update of int8 parameters: a two-sided Z-test of every weight, and a step of one.

    Z = sum_p d_p E_p        moves the weight by sign(Z) where |Z| > T sd(Z),  T = Phi^-1(1 - alpha / 2)

sd(Z) is what the sum would have if the fitness had nothing to do with the noise: alpha is then the share of weights that move.
Without state, without floating point once traced: T is computed on the host, in steps of 1/256.

The rule is EGGROLL's (arXiv 2511.16652, section 6.1 and appendix H). It differs from the authors' code: Z = 0 never moves
(there it moves by -1 while the threshold is 0), T and the root of the number of pairs have 8 and 4 bits of fraction instead of
4 and 0, and sd(Z) is that of the noise as it is, so that every rank, distribution and shaping has the same alpha.
"""

from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from eggroll.noise import integer

Alpha = float | Callable[[int], float]


def threshold(alpha: Alpha, *, steps: int | None = None) -> optax.GradientTransformationExtraArgs:
    """Make the transformation that turns sums of integer noise into steps of -1, 0 and 1.

    Its `update` gets -Z, as optax minimises, and needs the parameters and, as `EvolutionStrategy` gives them, `deviation`
    (int32 scalars like the parameters, sd(Z) in sixteenths) and `generation` (int32). The steps are of the parameters' dtype;
    added to them they never leave [-127, 127].

    Args:
        alpha: share of the weights that move when the fitness says nothing, in (0, 1], or a function from generation to it,
            called on the host when this is.
        steps: generations that the function is called for; later ones have the last value. None: 10,000.

    Raises:
        ValueError: `alpha` is outside (0, 1], `steps` is not an integer >= 1, or is given for a constant.
    """
    if steps is not None and not callable(alpha):
        raise ValueError(f"steps has no effect on a constant alpha, got {steps!r}.")
    steps = 10_000 if steps is None else steps
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an integer >= 1, got {steps!r}.")
    levels = np.array([_level(alpha(step), step) for step in range(steps)] if callable(alpha) else [_level(alpha)], np.int32)
    starts = np.flatnonzero(np.diff(levels, prepend=-1)).astype(np.int32)

    def init(params: Any) -> optax.EmptyState:
        return optax.EmptyState()

    def update(updates, state, params=None, *, deviation, generation, **_):
        level = jnp.asarray(levels[starts])[jnp.sum(generation >= jnp.asarray(starts), dtype=jnp.int32) - 1]
        least = jax.tree.map(lambda spread: integer.multiply_shifted(spread, level, 12), deviation)
        return jax.tree.map(_step, updates, params, least), state

    return optax.GradientTransformationExtraArgs(init, update)


def _level(alpha: Any, step: int | None = None) -> int:
    """T in steps of 1/256."""
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha must be in (0, 1], got {alpha!r}{'' if step is None else f' for generation {step}'}.")
    return round(-256 * NormalDist().inv_cdf(float(alpha) / 2))


def _step(descent: Array, param: Array, least: Array) -> Array:
    """The step of one parameter, against `descent`. Frozen ones of other dtypes have sums of zero, which stay."""
    if param.dtype != jnp.int8:
        return descent
    direction = jnp.where(jnp.abs(descent) > least, -jnp.sign(descent), 0)
    wide = param.astype(jnp.int32)
    return (integer.saturate(wide + direction).astype(jnp.int32) - wide).astype(param.dtype)
