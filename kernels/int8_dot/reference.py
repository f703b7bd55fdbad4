"""Specification of the integer product of a population, exact in int32.

    total[p, j] = x[p, j] w + sign[p, j] round(2^-bits (x[p, j] left[p]^T) right[p])
    out         = total, or with `shift` clip(floor(2^-shift total + 1/2), -127, 127)

Noise is rounded to nearest, halves away from zero, so the members of a pair mirror each other; results to nearest, halves up.
"""

import jax.numpy as jnp
from jax import Array

from eggroll.kernels.factors import Values

LARGEST = 127


def int8_dot(x: Array, w: Array, noise: Values, *, sign: Array, bits: int, shift: int | None = None) -> Array:
    """See `api.int8_dot`."""
    wide = jnp.int32
    base = jnp.einsum("pjm,mn->pjn", x, w, preferred_element_type=wide)
    hidden = jnp.einsum("pjm,pkm->pjk", x, noise.left, preferred_element_type=wide)
    term = jnp.einsum("pjk,pkn->pjn", hidden, noise.right.astype(wide), preferred_element_type=wide)
    return rescaled(base + sign[..., None].astype(wide) * rounded(term, bits), shift)


def rounded(term: Array, bits: int) -> Array:
    """round(term / 2^bits) of int32, halves away from zero."""
    if bits == 0:
        return term
    return (term + jnp.int32(1 << (bits - 1)) + (term >> jnp.int32(31))) >> jnp.int32(bits)


def rescaled(total: Array, shift: int | None) -> Array:
    """floor(total / 2^shift + 1/2) as int8 in [-127, 127]; None: the int32 total itself."""
    if shift is None:
        return total
    half = jnp.int32((1 << shift) >> 1)
    near = (total + half) >> jnp.int32(shift)
    return jnp.clip(near, jnp.int32(-LARGEST), jnp.int32(LARGEST)).astype(jnp.int8)
