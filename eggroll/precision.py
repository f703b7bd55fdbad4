"""Updates of low-precision parameters that do not get lost in rounding.

A bfloat16 weight near 1 moves in steps of 2^-8; an update of 1e-6 rounded to nearest moves one weight in a hundred. Three ways:

    "master"      keep a float32 copy of every low-precision parameter, update it, round it for the forward pass (exact)
    "stochastic"  round up or down with the probability that keeps the mean (no copy, unbiased)
    "nearest"     round to nearest (plain optax.apply_updates; loses small updates)

The optimizer always sees float32 parameters and gradients. Float32 parameters are the same under all three.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

PRECISIONS = ("master", "stochastic", "nearest")
Masters = tuple[Array | None, ...]


def is_low(leaf: Array) -> bool:
    """Whether a leaf is a float of fewer than 32 bits."""
    return bool(jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4)


def init_masters(params: Any, precision: str) -> Masters:
    """Float32 copies of the low-precision leaves, in leaf order, None for the others and for other precisions."""
    return tuple(
        leaf.astype(jnp.float32) if precision == "master" and is_low(leaf) else None for leaf in jax.tree.leaves(params)
    )


def float32_params(params: Any, masters: Masters) -> Any:
    """The parameters as the optimizer sees them: masters or float32 casts of low-precision leaves."""
    leaves, tree = jax.tree.flatten(params)
    wide = [
        master if master is not None else leaf.astype(jnp.float32) if is_low(leaf) else leaf
        for leaf, master in zip(leaves, masters, strict=True)
    ]
    return jax.tree.unflatten(tree, wide)


def apply_updates(params: Any, masters: Masters, updates: Any, *, precision: str, key: Array) -> tuple[Any, Masters]:
    """Add float32 updates to the parameters.

    Args:
        params: the parameters in their storage dtypes.
        masters: from `init_masters`.
        updates: float32 pytree like `params`.
        precision: "master", "stochastic" or "nearest".
        key: consumed by stochastic rounding.

    Returns:
        `(params, masters)` in the dtypes they came in.
    """
    leaves, tree = jax.tree.flatten(params)
    wide = jax.tree.leaves(float32_params(params, masters))
    added = [
        w + u.astype(w.dtype) if jnp.issubdtype(w.dtype, jnp.floating) else w  # frozen integers and keys stay
        for w, u in zip(wide, jax.tree.leaves(updates), strict=True)
    ]
    new_leaves = [
        stochastic_round(new, leaf.dtype, uniform=jax.random.uniform(jax.random.fold_in(key, i), new.shape))
        if precision == "stochastic" and is_low(leaf)
        else (new.astype(leaf.dtype) if is_low(leaf) else new)
        for i, (new, leaf) in enumerate(zip(added, leaves, strict=True))
    ]
    new_masters = tuple(None if m is None else new for m, new in zip(masters, added, strict=True))
    return jax.tree.unflatten(tree, new_leaves), new_masters


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
