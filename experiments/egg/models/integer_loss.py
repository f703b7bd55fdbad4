"""Log-likelihood of a byte from int8 logits, in integers.

    log2 p(t) = (y_t - m) / 16 - log2 sum_i 2^((y_i - m) / 16),    m = max_i y_i

Logits are fixed-point numbers with 4 fractional bits, and base 2: 16 more makes a byte twice as likely. The powers come from a
table of 256 int32 in units of 2^-22, so that their sum of at most 2^30 fits int32. The logarithm of the sum is its highest set
bit (count of leading zeros) and a table of 2048 mantissas. Together they are 9 KiB. The error is at most 0.0024 bits: half a
unit (0.00195), half a step of the mantissa (0.00035), and the rounding of the powers (below 0.00005 in all).

The rule "floor" is that of the EGGROLL paper's code, exactly, in its units of 1/16 bit, without its table of 1 GiB.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from eggroll.experiments.egg.models.fixed_point import Rounding

UNITS_PER_BIT = {"nearest": 256, "floor": 16}
MAX_TOKENS = 350_000  # a byte has at most 24 bits, so sums over this many fit int32 in both units

_POWER_BITS, _MANTISSA_BITS = 22, 11
_POWERS = np.round(2.0 ** (_POWER_BITS + (np.arange(256) - 255) / 16)).astype(np.int32)
_MANTISSAS = np.round(256 * np.log2(1 + (np.arange(2**_MANTISSA_BITS) + 0.5) / 2**_MANTISSA_BITS)).astype(np.int32)
_PAPER_POWERS = (16 * 2.0 ** (np.arange(256) / 16)).astype(np.int32)
_SIXTEENTHS = np.ceil(2.0 ** (30 + np.arange(1, 16) / 16)).astype(np.int32)  # mantissas at which log2 is k/16 larger


def log_likelihood(logits: Array, target: Array, *, rounding: Rounding = "nearest") -> Array:
    """Score one prediction.

    Args:
        logits: int8 [256], values in [-127, 127].
        target: uint8 or int32 [], the actual byte.
        rounding: "nearest", in units of 1/256 bit, or "floor", the paper's code, in units of 1/16 bit.

    Returns:
        int32 [], log2 of the target's probability in units of 1 / UNITS_PER_BIT[rounding] bit.
    """
    wide = logits.astype(jnp.int32)
    chosen = jnp.take(wide, target, mode="clip")
    if rounding == "floor":
        total = jnp.sum(jnp.take(_PAPER_POWERS, wide + 128, mode="clip"))
        return chosen + 128 - (_floor_log2_sixteenths(total) - 4 * 16)
    largest = jnp.max(wide)
    total = jnp.sum(jnp.take(_POWERS, wide - largest + 255, mode="clip"))
    return (chosen - largest) * 16 - (_log2(total) - 256 * _POWER_BITS)


def _log2(total: Array) -> Array:
    """Return log2 of int32 in [2^11, 2^31) in units of 1/256, at the middle of its mantissa's step."""
    exponent = 31 - jax.lax.clz(total)
    mantissa = (total >> (exponent - _MANTISSA_BITS)) & (2**_MANTISSA_BITS - 1)
    return (exponent << 8) + jnp.take(_MANTISSAS, mantissa, mode="clip")


def _floor_log2_sixteenths(total: Array) -> Array:
    """Return log2 of positive int32 in units of 1/16, rounded down."""
    zeros = jax.lax.clz(total)
    mantissa = total << (zeros - 1)  # in [2^30, 2^31)
    return ((31 - zeros) << 4) + jnp.sum((mantissa[..., None] >= _SIXTEENTHS).astype(jnp.int32), axis=-1)
