"""Updates of low-precision and quantised parameters that do not get lost in rounding.

A bfloat16 weight near 1 moves in steps of 2^-8; an update of 1e-6 rounded to nearest moves one weight in a hundred. Three ways:

    "master"      keep a float32 copy of every low-precision parameter, update it, round it for the forward pass (exact)
    "stochastic"  round up or down with the probability that keeps the mean (no copy, unbiased)
    "nearest"     round to nearest (plain optax.apply_updates; loses small updates)

The optimizer always sees float32 parameters and gradients. Float32 parameters are the same under all three. Quantised int8
parameters (`rules.is_quantised`) move on the integers from -127 to 127 in the same three ways; so far do their masters go.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from eggroll.noise.integer import LARGEST
from eggroll.state import Masters

PRECISIONS = ("master", "stochastic", "nearest")


def is_low(leaf: Array) -> bool:
    """Whether a leaf is a float of fewer than 32 bits."""
    return bool(jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4)


def init_masters(params: Any, precision: str, *, quantised: Sequence[bool] | None = None) -> Masters:
    """Float32 copies of the low-precision and quantised leaves, in leaf order, None for the others and other precisions."""
    leaves = jax.tree.leaves(params)
    short = _short(leaves, quantised)
    return tuple(
        leaf.astype(jnp.float32) if precision == "master" and is_short else None
        for leaf, is_short in zip(leaves, short, strict=True)
    )


def _short(leaves: Sequence[Array], quantised: Sequence[bool] | None) -> list[bool]:
    """Whether every leaf is held in fewer bits than it is updated in."""
    grid = quantised or [False] * len(leaves)
    return [is_low(leaf) or on_grid for leaf, on_grid in zip(leaves, grid, strict=True)]


def float32_params(params: Any, masters: Masters, *, quantised: Sequence[bool] | None = None) -> Any:
    """The parameters as the optimizer sees them: masters or float32 casts of low-precision and quantised leaves."""
    leaves, tree = jax.tree.flatten(params)
    wide = [
        master if master is not None else leaf.astype(jnp.float32) if is_short else leaf
        for leaf, master, is_short in zip(leaves, masters, _short(leaves, quantised), strict=True)
    ]
    return jax.tree.unflatten(tree, wide)


def apply_updates(
    params: Any,
    masters: Masters,
    updates: Any,
    *,
    precision: str,
    key: Array,
    quantised: Sequence[bool] | None = None,
) -> tuple[Any, Masters]:
    """Add float32 updates to the parameters.

    Args:
        params: the parameters in their storage dtypes.
        masters: from `init_masters`.
        updates: float32 pytree like `params`.
        precision: "master", "stochastic" or "nearest".
        key: consumed by stochastic rounding.
        quantised: which leaves are int8 and move on the integers; None: none.

    Returns:
        `(params, masters)` in the dtypes they came in.
    """
    leaves, tree = jax.tree.flatten(params)
    wide = jax.tree.leaves(float32_params(params, masters, quantised=quantised))
    added = [
        w + u.astype(w.dtype) if jnp.issubdtype(w.dtype, jnp.floating) else w  # frozen integers and keys stay
        for w, u in zip(wide, jax.tree.leaves(updates), strict=True)
    ]
    grid = quantised or [False] * len(leaves)
    added = [jnp.clip(new, -LARGEST, LARGEST) if on_grid else new for new, on_grid in zip(added, grid, strict=True)]
    short = _short(leaves, quantised)
    drawn = [
        jax.random.uniform(jax.random.fold_in(key, i), new.shape) if precision == "stochastic" and short[i] else None
        for i, new in enumerate(added)
    ]
    new_leaves = [_stored(*of_leaf) for of_leaf in zip(added, leaves, grid, drawn, strict=True)]
    new_masters = tuple(None if m is None else new for m, new in zip(masters, added, strict=True))
    return jax.tree.unflatten(tree, new_leaves), new_masters


def _stored(new: Array, leaf: Array, on_grid: bool, uniform: Array | None) -> Array:
    """A new value in the leaf's dtype; rounded to nearest without `uniform`."""
    if on_grid:
        return integer_round(new, uniform=uniform).astype(leaf.dtype)
    return new.astype(leaf.dtype) if uniform is None else stochastic_round(new, leaf.dtype, uniform=uniform)


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
    exponent = jnp.maximum(jnp.frexp(value)[1] - 1, int(info.minexp))
    ulp = jnp.ldexp(jnp.float32(1), exponent - info.nmant)
    whole = jnp.floor(value / ulp)
    up = uniform < value / ulp - whole
    rounded = (whole + up.astype(jnp.float32)) * ulp
    return jnp.where(jnp.isfinite(value), rounded, value).astype(dtype)
