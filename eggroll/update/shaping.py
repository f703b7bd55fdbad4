"""Fitness shaping: raw fitness [N] or [N, K] to shaped fitness [N], pure functions.

    centered_ranks    rank / (N - 1) - 1/2, ties share their average rank
    z_score           (f - mean) / std
    group_relative    (f - mean of its group) / std over all
    pair_sign         +1/2 for the better member of a pair, -1/2 for the worse, 0 for a tie

Members are ordered (P, 2): 2 p and 2 p + 1 are a pair. A fitness that is not finite counts as the worst. Columns of an [N, K]
fitness (prompts, tasks) are shaped each by itself and averaged. When all are equal every pair difference is exactly zero.

Int8 parameters have shapings of their own, from fitness to small whole coefficients of the pairs: `integer_coefficients`.
"""

import functools
import math
from collections.abc import Callable
from typing import Concatenate, ParamSpec

import jax
import jax.numpy as jnp
from jax import Array

from eggroll.noise.integer import INT32
from eggroll.noise.leaves import at_least_float32
from eggroll.population.metrics import divide

Shaping = Callable[[Array], Array]
P = ParamSpec("P")


def _by_column(shaping: Callable[Concatenate[Array, P], Array]) -> Callable[Concatenate[Array, P], Array]:
    @functools.wraps(shaping)
    def shaped(fitness: Array, *args: P.args, **options: P.kwargs) -> Array:
        columns = fitness.reshape(fitness.shape[0], -1).astype(at_least_float32(fitness.dtype))
        return shaping(columns, *args, **options).mean(axis=1)

    return shaped


def replace_nonfinite(fitness: Array) -> Array:
    """Replace values that are not finite by the worst finite value of their column, 0 where a column has none."""
    finite = jnp.isfinite(fitness)
    worst = jnp.min(jnp.where(finite, fitness, jnp.inf), axis=0, keepdims=True)
    return jnp.where(finite, fitness, jnp.where(jnp.isfinite(worst), worst, 0.0))


@_by_column
def centered_ranks(fitness: Array) -> Array:
    """Shape [N] or [N, K] fitness by centred ranks in [-1/2, 1/2] (Salimans et al., arXiv 1703.03864, section 2)."""
    fitness = jnp.where(jnp.isfinite(fitness), fitness, -jnp.inf)
    return jax.vmap(_column_ranks, in_axes=1, out_axes=1)(fitness)


def _column_ranks(column: Array) -> Array:
    ordered = jnp.sort(column)
    below = jnp.searchsorted(ordered, column, side="left").astype(jnp.float32)
    not_above = jnp.searchsorted(ordered, column, side="right").astype(jnp.float32)
    return (below + not_above - 1.0) / (2.0 * (column.shape[0] - 1)) - 0.5


@_by_column
def z_score(fitness: Array) -> Array:
    """Shape [N] or [N, K] fitness to zero mean and unit population standard deviation."""
    fitness = replace_nonfinite(fitness)
    size = jnp.abs(fitness).max(axis=0)
    fitness = divide(fitness, jnp.where(size > 0, size, 1.0))  # no overflow of the square when one member diverged
    return (fitness - fitness.mean(axis=0)) / (fitness.std(axis=0) + 1e-8)


@_by_column
def pair_sign(fitness: Array) -> Array:
    """Shape [N] or [N, K] fitness by which member of each pair is better (EGGROLL, appendix H.2)."""
    fitness = jnp.where(jnp.isfinite(fitness), fitness, -jnp.inf)
    better = fitness[0::2] > fitness[1::2]
    worse = fitness[0::2] < fitness[1::2]
    half = 0.5 * (better.astype(fitness.dtype) - worse.astype(fitness.dtype))
    return jnp.stack([half, -half], axis=1).reshape(fitness.shape)


def group_relative(fitness: Array, *, group_size: int | None = None) -> Array:
    """Shape fitness relative to its group, in units of the global standard deviation (EGGROLL, section 6.3).

    Args:
        fitness: [N], or [N, K] over K prompts; members that saw the same prompt are a group.
        group_size: consecutive members of a group, even and dividing N; None: all, which needs [N, K].

    Returns:
        [N]: (f - group mean) / sqrt(global variance + 1e-5), averaged over columns.

    Raises:
        ValueError: `group_size` missing for [N], odd, or not dividing N.
    """
    size = fitness.shape[0] if group_size is None and fitness.ndim == 2 else group_size
    if not size or size % 2 or fitness.shape[0] % size:
        raise ValueError(f"group_size must be even and divide population_size {fitness.shape[0]}, got {group_size}.")
    columns = fitness.astype(at_least_float32(fitness.dtype))
    groups = jax.vmap(replace_nonfinite)(columns.reshape(-1, size, math.prod(fitness.shape[1:])))
    unit = jnp.maximum(jnp.abs(groups).max(), 1.0)  # no overflow of the square when one member diverged
    groups = divide(groups, unit)
    centred = groups - groups.mean(axis=1, keepdims=True)
    return (centred / jnp.sqrt(groups.var() + 1e-5 / unit / unit)).mean(axis=2).reshape(-1)


SHAPINGS: dict[str, Shaping] = {
    "centered_ranks": centered_ranks,
    "z_score": z_score,
    "group_relative": group_relative,
    "pair_sign": pair_sign,
}


def shape_fitness(shaping: str | Shaping, fitness: Array) -> Array:
    """Shape raw fitness [N] or [N, K] by name or by a user's function, which sees worst values instead of NaN.

    Raises:
        ValueError: the user's function does not return [N].
    """
    if isinstance(shaping, str):
        return SHAPINGS[shaping](fitness)
    shaped = shaping(replace_nonfinite(fitness.reshape(fitness.shape[0], -1)).reshape(fitness.shape))
    if shaped.shape != fitness.shape[:1]:
        raise ValueError(f"shaping must return shape ({fitness.shape[0]},), got {shaped.shape} for fitness {fitness.shape}.")
    return shaped.astype(at_least_float32(shaped.dtype))


INTEGER_SHAPINGS = ("pair_sign", "z_score")


def integer_coefficients(shaping: str, fitness: Array, *, largest_noise: int) -> Array:
    """Shape raw fitness [N] or [N, K] to whole coefficients of the pairs, for int8 parameters.

    "pair_sign": 1 where the first member of the pair is better in more columns, -1 where the second is.
    "z_score": the pair's difference of the sum over columns, in units of the mean size of these differences, clipped at 4 of
    them. It is as fine as sums of P coefficients times noise allow without leaving int32, at most 1/16 of a unit.

    Args:
        shaping: one of `INTEGER_SHAPINGS`.
        fitness: int32 below 2^30 in size; floats only for "pair_sign".
        largest_noise: largest entry of the noise of one pair as the update sums it.

    Returns:
        int8 [P] of -1, 0 and 1, or int32 [P].

    Raises:
        TypeError: "z_score" of floats.
    """
    columns = fitness.reshape(fitness.shape[0], -1)
    if shaping == "pair_sign":
        if jnp.issubdtype(columns.dtype, jnp.floating):
            columns = jnp.where(jnp.isfinite(columns), columns, -jnp.inf)
        better, worse = columns[0::2] > columns[1::2], columns[0::2] < columns[1::2]
        return jnp.sign((better.astype(jnp.int32) - worse.astype(jnp.int32)).sum(axis=1)).astype(jnp.int8)
    if not jnp.issubdtype(fitness.dtype, jnp.integer):
        raise TypeError(f"shaping 'z_score' of int8 parameters needs an int32 fitness, got {fitness.dtype}.")
    scores = columns.sum(axis=1)
    return _unit_differences(scores[0::2] - scores[1::2], INT32 // (largest_noise * scores.shape[0] // 2))


def _unit_differences(differences: Array, allowed: int) -> Array:
    """Differences [P] in units of their mean size, as whole numbers of at most `allowed`."""
    limit = min(64, allowed)
    unit = max(1, limit // 4)
    sizes = jnp.abs(differences)
    room = 30 - max(4, (sizes.shape[0] - 1).bit_length())  # bits that leave the sum, and 16 times a size, in int32
    excess = 32 - jax.lax.clz(sizes.max()) - room
    sizes = (sizes >> jnp.maximum(excess, 0)) << jnp.maximum(-excess, 0)
    mean = jnp.maximum(1, (sizes.sum() + sizes.shape[0] // 2) // sizes.shape[0])
    return jnp.sign(differences) * jnp.minimum(limit, (unit * sizes + mean // 2) // mean)
