"""Updates of low-precision and quantised parameters that do not get lost in rounding.

A bfloat16 weight near 1 moves in steps of 2^-8; an update of 1e-6 rounded to nearest moves one weight in a hundred. Three ways:

    "master"      keep a float32 copy of every low-precision parameter, update it, round it for the forward pass (exact)
    "stochastic"  round up or down with the probability that keeps the mean (no copy, unbiased)
    "nearest"     round to nearest (plain optax.apply_updates; loses small updates)

and a fourth for quantised parameters, `feedback.Feedback`.

The optimizer always sees float32 parameters and gradients. Float32 parameters are the same under all three. Quantised int8
parameters (`rules.is_quantised`) move on the integers from -127 to 127 in the same three ways; masters stay in that range.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.random import threefry2x32_p

from eggroll.kernels.lowrank_update.reference import rounded
from eggroll.state import Masters

PRECISIONS = ("master", "stochastic", "nearest")


def is_low(leaf: Array) -> bool:
    """Whether a leaf is a float of fewer than 32 bits."""
    return bool(jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4)


def init_masters(
    params: Any, precision: Any, *, quantised: Sequence[bool] | None = None, moving: Sequence[bool] | None = None
) -> Masters:
    """Float32 copies of the low-precision and quantised leaves, in leaf order.

    None for the others, for those that are not `moving` (None: all are), and for other precisions.
    """
    leaves = jax.tree.leaves(params)
    short, moves = are_short(leaves, quantised), moving or [True] * len(leaves)
    return tuple(
        leaf.astype(jnp.float32) if precision == "master" and is_short and changes else None
        for leaf, is_short, changes in zip(leaves, short, moves, strict=True)
    )


def are_short(leaves: Sequence[Array], quantised: Sequence[bool] | None) -> list[bool]:
    """Whether each of some leaves is held in fewer bits than it is updated in."""
    grid = quantised or [False] * len(leaves)
    return [is_low(leaf) or on_grid for leaf, on_grid in zip(leaves, grid, strict=True)]


def float32_params(params: Any, masters: Masters, *, quantised: Sequence[bool] | None = None) -> Any:
    """The parameters as the optimizer sees them: masters or float32 casts of low-precision and quantised leaves."""
    leaves, tree = jax.tree.flatten(params)
    wide = [
        master if master is not None else leaf.astype(jnp.float32) if is_short else leaf
        for leaf, master, is_short in zip(leaves, masters, are_short(leaves, quantised), strict=True)
    ]
    return jax.tree.unflatten(tree, wide)


def store(new: Array, dtype: Any, *, on_grid: bool, words: Array | None) -> Array:
    """Round a float32 value to the dtype that a parameter is stored in.

    Args:
        new: float32.
        dtype: of the stored parameter.
        on_grid: the parameter is int8 and moves on the integers.
        words: uint32 like `new`, random, for stochastic rounding; None: to nearest.

    Returns:
        Array of `dtype`.
    """
    uniform = None if words is None else uniforms(words)
    if on_grid:
        return integer_round(new, uniform=uniform).astype(dtype)
    if words is None or uniform is None:
        return new.astype(dtype)
    return rounded(new, words) if dtype == jnp.bfloat16 else stochastic_round(new, dtype, uniform=uniform)


def rounding_words(key: Array, shape: Sequence[int], starts: Sequence[Array | int], sizes: Sequence[int]) -> Array:
    """Random words of a region of a parameter, the same however the parameter is cut: word i, j of entry [i, *j].

    Args:
        key: typed threefry key of the parameter in one generation.
        shape: of the parameter.
        starts: of the region, one per axis.
        sizes: of the region.

    Returns:
        uint32 of `sizes`.
    """
    along = [
        jnp.asarray(start).astype(jnp.uint32) + jax.lax.broadcasted_iota(jnp.uint32, tuple(sizes), axis)
        for axis, start in enumerate(starts)
    ]
    high, low = (along[0] if along else jnp.uint32(0)), jnp.zeros(tuple(sizes), jnp.uint32)
    for index, size in zip(along[1:], shape[1:], strict=True):
        low = low * jnp.uint32(size) + index
    halves = (jnp.broadcast_to(half, tuple(sizes)) for half in (*jax.random.key_data(key), high, low))
    return threefry2x32_p.bind(*halves)[0]


def uniforms(words: Array) -> Array:
    """Turn random words into float32 numbers in [0, 1), multiples of 2^-24."""
    return (words >> 8).astype(jnp.float32) * jnp.float32(2**-24)


def integer_round(value: Array, *, uniform: Array | None) -> Array:
    """Round to whole numbers: up with the probability of the remainder, which keeps the mean; to nearest without `uniform`."""
    if uniform is None:
        return jnp.round(value)
    whole = jnp.floor(value)
    return whole + (uniform < value - whole).astype(value.dtype)


def stochastic_round(value: Array, dtype: Any, *, uniform: Array) -> Array:
    """Round float32 to a shorter float so that the mean is kept: up with the probability of the remainder.

    Values that are not finite are rounded to nearest.

    Args:
        value: float32 array.
        dtype: the shorter floating dtype.
        uniform: float32 in [0, 1), like `value`: rounded up where it is less than the remainder.

    Returns:
        Array of `dtype`, each entry one of the two neighbours of its value.
    """
    info = jnp.finfo(dtype)
    exponent = jax.lax.bitcast_convert_type(value, jnp.int32) & 0x7F800000  # where it lies in a float32; frexp is slower
    least = max(float(info.smallest_normal), 2.0 ** (info.nmant - 126))  # the unit is not subnormal in float32 either
    exponent = jnp.maximum(exponent, np.float32(least).view(np.int32))
    ulp = jax.lax.bitcast_convert_type(exponent, jnp.float32) * jnp.float32(2.0**-info.nmant)
    whole = jnp.floor(value / ulp)
    up = uniform < value / ulp - whole
    rounded = (whole + up.astype(jnp.float32)) * ulp
    return jnp.where(jnp.isfinite(value), rounded, value).astype(dtype)
