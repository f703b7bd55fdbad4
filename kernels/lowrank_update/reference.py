"""Specification of the low-rank update: G = sum_p d_p A_p^T B_p, one matrix product over K = P r; and of w + G, rounded."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.random import threefry2x32_p

from eggroll.kernels.factors import Noise, values_of


def lowrank_update(coefficients: Array, left: Array, right: Array) -> Array:
    """Sum low-rank matrices weighted by one coefficient per pair.

    Args:
        coefficients: [P] float32.
        left: [P, *S, r, m], any floating dtype.
        right: [P, *S, r, n].

    Returns:
        float32 [*S, m, n], accumulated in float32.
    """
    weights = coefficients.reshape((-1,) + (1,) * (left.ndim - 1))
    left, right = _terms(left.astype(jnp.float32) * weights), _terms(right.astype(jnp.float32))
    return jnp.einsum("...km,...kn->...mn", left, right, precision=jax.lax.Precision.HIGHEST)


def integer_lowrank_update(coefficients: Array, left: Array, right: Array) -> Array:
    """Sum low-rank matrices weighted by one coefficient per pair, exactly while the sum fits int32.

    Args:
        coefficients: [P], int8 where they are -1, 0 or 1 (both operands of the product are int8 then), else int32.
        left: [P, *S, r, m], int8.
        right: [P, *S, r, n], int8.

    Returns:
        int32 [*S, m, n].
    """
    weights = coefficients.reshape((-1,) + (1,) * (left.ndim - 1))
    left, right = _terms(left.astype(weights.dtype) * weights), _terms(right.astype(weights.dtype))
    return jnp.einsum("...km,...kn->...mn", left, right, preferred_element_type=jnp.int32)


def _terms(factor: Array) -> Array:
    """[P, *S, r, m] -> [*S, P r, m]; without stacked axes this is a reshape, no copy."""
    factor = jnp.moveaxis(factor, 0, -3)
    return factor.reshape(*factor.shape[:-3], -1, factor.shape[-1])


def population_update(coefficients: Array, noise: Noise, *, rank: int, rows: int, columns: int) -> Array:
    """Specification of `api.lowrank_update`: `lowrank_update` of the noise as values."""
    return lowrank_update(coefficients, *values_of(noise, rank=rank, rows=rows, columns=columns, dtype=jnp.float32))


def population_step(w: Array, coefficients: Array, noise: Noise, *, key: Array, rank: int) -> Array:
    """Specification of `api.lowrank_step`: w + G rounded to bfloat16, up or down with the probability that keeps the mean."""
    total = w.astype(jnp.float32) + population_update(coefficients, noise, rank=rank, rows=w.shape[0], columns=w.shape[1])
    row, column = (jax.lax.broadcasted_iota(jnp.uint32, w.shape, axis) for axis in (0, 1))
    words, _ = threefry2x32_p.bind(*(jnp.broadcast_to(half, w.shape) for half in key), row, column)
    return rounded(total, words)


def rounded(value: Array, words: Array) -> Array:
    """Round float32 to bfloat16: 16 random bits of a word are added below its last place, and what is below is cut off."""
    bits = jax.lax.bitcast_convert_type(value, jnp.uint32)
    up = (bits + (words & jnp.uint32(0xFFFF))) & jnp.uint32(0xFFFF0000)
    finite = (bits & jnp.uint32(0x7F800000)) != jnp.uint32(0x7F800000)
    return jax.lax.bitcast_convert_type(jnp.where(finite, up, bits), jnp.float32).astype(jnp.bfloat16)
