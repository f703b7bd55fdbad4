"""Fixed-point arithmetic of an integer network: int8 values with 4 fractional bits, so that 16 stands for 1.0.

    y = clip(round(x W / (16 sqrt(n))), -127, 127)        x int8 [n], W int8 [n, m], sums in int32

Values lie in [-127, 127]; -128 never occurs. Rounding is to nearest, ties up: over all remainders of a division by d the mean
error is 1 / (2 d) of the last bit. The rule "floor" is that of the EGGROLL paper's code; its results are on average (d - 1) /
(2 d) of the last bit too small, 0.496 at fan-in 64, where d is 128.
Every product of the network is `product`, one `dot_general` of int8 arrays with an int32 result, which XLA runs on the integer
units (experiments/LOG.md compares other forms) and which perturbations of the weights intercept.
"""

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array

Rounding = Literal["nearest", "floor"]

FRACTIONAL_BITS = 4
LARGEST = 127
MAX_FAN_IN = (2**31 - 1) // LARGEST**2  # 133,143: a longer sum of products of int8 values may not fit int32
_RECIPROCAL_BITS = 23  # 127 * 2^23 plus one half stays below 2^31


def check_rounding(rounding: str) -> None:
    """Raise ValueError for an unknown rule."""
    if rounding not in get_args(Rounding):
        raise ValueError(f"rounding must be one of {', '.join(get_args(Rounding))}, got {rounding!r}.")


def product(x: Array, weights: Array) -> Array:
    """Multiply without rescaling.

    Args:
        x: int8 [n].
        weights: int8 [n, m].

    Returns:
        int32 [m], exact for n up to MAX_FAN_IN.
    """
    return jax.lax.dot_general(x, weights, (((0,), (0,)), ((), ())), preferred_element_type=jnp.int32)


def rescale(total: Array, fan_in: int, *, rounding: Rounding) -> Array:
    """Divide the sums of a product by 16 sqrt(fan_in): unit-variance inputs and weights give unit-variance outputs.

    The division is a product with a 23-bit reciprocal and a shift. It is exact where sqrt(fan_in) is a power of two; elsewhere
    the quotient is off by at most 127 * 16 sqrt(fan_in) / 2^24 of the last bit before it is rounded: 0.0017 at fan-in 200.

    Args:
        total: int32; large values saturate.
        fan_in: number of summed products.
        rounding: "nearest", or "floor" as in the paper's code.

    Returns:
        int8 of the same shape.
    """
    reciprocal = round(2**_RECIPROCAL_BITS / (2**FRACTIONAL_BITS * math.sqrt(fan_in)))
    full, rest = divmod(LARGEST << _RECIPROCAL_BITS, reciprocal)
    inside = jnp.clip(total, -full, full + (rest > 0))  # gives -127 and 127 under both rules
    return shift_right(inside * reciprocal, _RECIPROCAL_BITS, rounding=rounding).astype(jnp.int8)


def shift_right(value: Array, bits: int, *, rounding: Rounding) -> Array:
    """Divide integers by 2^bits, rounding to nearest (ties up) or down."""
    half = 1 << (bits - 1) if rounding == "nearest" else 0
    return (value + half) >> bits


def saturating_sum(*terms: Array) -> Array:
    """Add int8 arrays; the exact sum is clipped to [-127, 127]."""
    total = terms[0].astype(jnp.int32)
    for term in terms[1:]:
        total += term.astype(jnp.int32)
    return saturate(total)


def saturate(value: Array) -> Array:
    """Clip int32 to [-127, 127] and return int8."""
    return jnp.clip(value, -LARGEST, LARGEST).astype(jnp.int8)
