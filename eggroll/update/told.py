"""Fitness that was computed outside JAX, as `tell` is given it: checked, and shaped in the precision that it came in.

A scorer in Python has float64, most devices do not: 1e8 and 1e8 + 1 are equal in float32. What the shapings of this library
make of a fitness depends on its order (`centered_ranks`, `pair_sign`) or on differences (`z_score`, `group_relative`), so they
are given ranks, or differences from the median, formed on the host. Reports keep the raw values, rounded.
"""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from eggroll.noise.leaves import at_least_float32
from eggroll.update.shaping import Shaping

BY_ORDER = ("centered_ranks", "pair_sign")
LARGEST_INTEGER = 2**30  # of an integer fitness of int8 parameters, whose differences are int32


class Told(NamedTuple):
    """A fitness as the device takes it."""

    fitness: Array  # [2 S] or [2 S, K], float32 (float64 where JAX has it) or int32: for the report
    scores: Array  # like fitness: for the shaping
    pairs: Array  # int32 [S]


def check_told(fitness: Any, pairs: Any, *, population_size: int, shaping: str | Shaping, integers: bool) -> Told:
    """Check a fitness and its pairs.

    Args:
        fitness: [2 S] or [2 S, K] real numbers.
        pairs: [S] ints, or None for all.
        population_size: N.
        shaping: of the strategy.
        integers: the parameters are int8: integers stay integers.

    Raises:
        ValueError: pairs outside the population or repeated, a fitness of another length, integers that do not fit.
        TypeError: a fitness that is not made of real numbers.
    """
    chosen = _check_pairs(pairs, population_size // 2)
    on_device = isinstance(fitness, Array) and (isinstance(fitness, jax.core.Tracer) or fitness.dtype.kind == "f")
    given = fitness if on_device else np.asarray(fitness)
    size, dtype = 2 * chosen.size, given.dtype
    if not any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_)):
        raise TypeError(f"fitness must be real numbers, got {dtype}.")
    if given.ndim not in (1, 2) or given.shape[0] != size:
        raise ValueError(f"fitness must have shape ({size},) or ({size}, K), got {given.shape}.")
    where = jnp.asarray(chosen, jnp.int32)
    whole = integers and jnp.issubdtype(dtype, jnp.signedinteger)
    if whole and not on_device and (largest := max(-int(given.min()), int(given.max()))) >= LARGEST_INTEGER:
        raise ValueError(f"an integer fitness must be less than 2^30 in size, got {largest}.")
    if on_device or whole:
        values = jnp.asarray(given).astype(jnp.int32 if whole else at_least_float32(dtype))
        return Told(values, values, where)
    values = jnp.asarray(_within_range(given))
    return Told(values, _exact_scores(given, np.asarray(values), shaping), where)


def _check_pairs(pairs: Any, num_pairs: int) -> np.ndarray:
    chosen = np.arange(num_pairs) if pairs is None else np.asarray(pairs)
    if chosen.ndim != 1 or not chosen.size or not np.isin(chosen, np.arange(num_pairs)).all():
        raise ValueError(f"pairs must be integers in [0, {num_pairs}), at least one, got {pairs!r}.")
    if np.unique(chosen).size != chosen.size:
        raise ValueError(f"pairs must name every pair once, got {pairs!r}.")
    return chosen


def _within_range(given: np.ndarray) -> np.ndarray:
    """Rounded to the floats of the device; finite values stay finite."""
    dtype = jax.dtypes.canonicalize_dtype(np.result_type(given.dtype, np.float32) if given.dtype.kind in "fiub" else np.float32)
    wide, most = given.astype(np.float64), float(np.finfo(dtype).max)
    return np.where(np.isfinite(wide), np.clip(wide, -most, most), wide).astype(dtype)


def _exact_scores(given: np.ndarray, rounded: np.ndarray, shaping: str | Shaping) -> Array:
    """The rounded values, or what the shaping makes the same of and does not lose in rounding."""
    if (given.dtype.kind == "f" and given.dtype.itemsize <= rounded.dtype.itemsize) or not _collapses(given, rounded):
        return jnp.asarray(rounded)
    if shaping in BY_ORDER:
        columns = given.reshape(len(given), -1)
        ranks = np.stack([np.unique(column, return_inverse=True)[1] for column in columns.T], axis=1).astype(rounded.dtype)
        return jnp.asarray(np.where(np.isfinite(columns.astype(np.float64)), ranks, np.nan).reshape(given.shape))
    if isinstance(shaping, str):
        wide = given if given.dtype.kind in "iu" else given.astype(np.float64)
        finite = np.where(np.isfinite(wide.astype(np.float64)), wide, np.nan) if wide.dtype.kind == "f" else wide
        middle = np.nanmedian(finite, axis=0) if wide.dtype.kind == "f" else np.sort(wide, axis=0)[len(wide) // 2]
        return jnp.asarray(_within_range(wide - middle))
    count = np.unique(given).size - np.unique(rounded).size
    warnings.warn(
        f"{count} values of the fitness differ from others by less than {rounded.dtype} can tell apart: the shaping does not "
        "see the difference. Subtract a constant or rescale before tell, or enable jax_enable_x64.",
        stacklevel=4,
    )
    return jnp.asarray(rounded)


def _collapses(given: np.ndarray, rounded: np.ndarray) -> bool:
    """Whether distinct values of a column became equal."""
    if given.dtype.kind == "f" and (rounded.astype(given.dtype) == given).all():
        return False
    columns = zip(given.reshape(len(given), -1).T, rounded.reshape(len(given), -1).T, strict=True)
    return any(np.unique(own).size > np.unique(near).size for own, near in columns)
