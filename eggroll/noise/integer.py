"""Integer noise for int8 parameters, and the fixed-point arithmetic around it; no floating point once traced.

    weight w and activation x      16 stands for 1
    factor of normal noise         round(16 z), |.| <= 59, two a random word, from a table of 4096 values indexed by 12 bits
    factor of Rademacher noise     -1 or 1
    member's product x W           x W + s round(2^-shift (x A) B^T / sqrt(r)), in the accumulator's units of 1/256
    other uses of a parameter      round(w + s 2^-shift E), saturated to [-127, 127]

Rounding is to nearest, halves away from zero, so the members of a pair mirror each other exactly. The table's mean is 0, its
variance 0.9995 of 256 and its fourth moment 2.990 of the squared variance, where the normal distribution has 3.
"""

import dataclasses
import math
from statistics import NormalDist

import jax.numpy as jnp
import numpy as np
from jax import Array

from eggroll.noise.addresses import WORD

ONE = 4  # bits of the fraction of weights and activations
LARGEST = 127  # |w| and |x|
FRACTION = {"normal": 4, "rademacher": 0}  # bits of the fraction of a factor
INT32 = 2**31 - 1
ROOT_BITS = 15  # of 1 / sqrt(r), where it is no power of two


# round(16 z) at the midpoints of 4096 equally likely intervals: int8 [4096], symmetric.
NORMAL_TABLE = np.array([round(16 * NormalDist().inv_cdf((i + 0.5) / 4096)) for i in range(4096)], np.int8)
NORMAL_TABLE.setflags(write=False)


def largest_factor(distribution: str) -> int:
    """The largest size of a factor."""
    return int(NORMAL_TABLE.max()) if distribution == "normal" else 1


def words_needed(count: int, distribution: str) -> int:
    """Random words for `count` factors."""
    return -(-count // (2 if distribution == "normal" else WORD))


def decode(words: Array, count: int, *, distribution: str) -> Array:
    """Turn random words into independent factors.

    Normal factors come from bits 4-15 of a word, then 20-31; Rademacher factor i is -1 when bit i % 32 of word i // 32 is set.

    Args:
        words: uint32 [..., words_needed(count, distribution)].
        count: factors wanted.
        distribution: "normal" or "rademacher".

    Returns:
        int8 [..., count].
    """
    width = WORD // 2 if distribution == "normal" else 1
    shifts = jnp.arange(0, WORD, width, dtype=jnp.uint32)
    bits = (words[..., None] >> shifts).reshape(*words.shape[:-1], -1)[..., :count]
    if distribution == "normal":
        return jnp.asarray(NORMAL_TABLE)[((bits >> jnp.uint32(4)) & jnp.uint32(4095)).astype(jnp.int32)]
    return 1 - 2 * (bits & jnp.uint32(1)).astype(jnp.int8)


@dataclasses.dataclass(frozen=True)
class IntegerNoise:
    """The integer noise of one parameter: its scale, as a perturbation and as the update sums it.

    Args:
        distribution: of the factors, "normal" or "rademacher".
        shift: sigma = 2^-shift.
        rank: r of a matrix, 1 of dense noise.
        factors: 2 of a matrix, whose noise is a product of factors; 1 of dense noise.
        sums_signs: the update sums the signs of factors.
    """

    distribution: str
    shift: int
    rank: int
    factors: int
    sums_signs: bool

    @property
    def scale(self) -> tuple[int, int]:
        """(multiplier, bits): a sum of products of factors, times multiplier / 2^bits, is the perturbation."""
        bits = self.shift - ONE + self.factors * FRACTION[self.distribution]
        half_log2 = (self.rank.bit_length() - 1) // 2
        if self.rank == 4**half_log2:
            return 1, bits + half_log2
        return round(2**ROOT_BITS / math.sqrt(self.rank)), bits + ROOT_BITS

    def rescale(self, total: Array) -> Array:
        """Turn sums of products of factors into the perturbation, int32: in the units of an accumulator, or of a weight."""
        multiplier, bits = self.scale
        if multiplier == 1:
            return total << -bits if bits <= 0 else shift_rounded(total, bits)
        total = multiply_shifted(total << max(0, ROOT_BITS - bits), multiplier, ROOT_BITS, half=True)
        return shift_rounded(total, max(0, bits - ROOT_BITS))

    def check_width(self, path: str, width: int) -> None:
        """Raise ValueError unless (x A) B^T fits int32 for int8 activations that are contracted over `width` values."""
        multiplier, bits = self.scale
        bits -= 0 if multiplier == 1 else ROOT_BITS
        growth = 2 ** max(0, -bits)
        largest = (INT32 - 2 ** max(0, bits)) // (LARGEST * largest_factor(self.distribution) ** 2 * growth)
        if width * self.rank > largest:
            raise ValueError(
                f"parameter '{path}' contracts {width} values with noise of rank {self.rank}, which could overflow int32: "
                f"width times rank must be at most {largest}."
            )

    @property
    def largest(self) -> int:
        """Largest entry of one pair's noise as the update sums it."""
        return self.rank * (1 if self.sums_signs else largest_factor(self.distribution)) ** self.factors

    @property
    def deviation(self) -> float:
        """Standard deviation of an entry of one pair's noise as the update sums it."""
        values = NORMAL_TABLE.astype(np.float64) if self.distribution == "normal" else np.ones(1)
        square = float(np.mean((np.sign(values) if self.sums_signs else values) ** 2))
        return math.sqrt(self.rank * square**self.factors)


def shift_rounded(total: Array, shift: int) -> Array:
    """round(total / 2^shift), halves away from zero, int32."""
    return total if shift == 0 else (total + (1 << (shift - 1)) + (total >> 31)) >> shift


def multiply_shifted(value: Array, multiplier: Array | int, bits: int, *, half: bool = False) -> Array:
    """floor(value * multiplier / 2^bits), or with `half` the nearest, where the product alone would not fit int32.

    Args:
        value: int32.
        multiplier: int32, >= 0 and below 2^(31 - bits).
        bits: at most 15.
        half: round to nearest.

    Returns:
        int32.
    """
    low = (value & ((1 << bits) - 1)) * multiplier + (1 << (bits - 1) if half else 0)
    return (value >> bits) * multiplier + (low >> bits)


def saturate(total: Array) -> Array:
    """Int32 to int8 in [-127, 127]."""
    return jnp.clip(total, -LARGEST, LARGEST).astype(jnp.int8)


def isqrt(value: Array) -> Array:
    """floor(sqrt(value)) of uint32, digit by digit."""
    root = jnp.zeros_like(value)
    for bit in range(15, -1, -1):
        candidate = root | jnp.uint32(1 << bit)
        root = jnp.where(candidate * candidate <= value, candidate, root)
    return root


def square_root(value: Array) -> Array:
    """16 sqrt(value) of an int32 >= 0, rounded down: int32."""
    value = value.astype(jnp.uint32)
    fine, coarse = isqrt(value << jnp.uint32(8)), isqrt(value) << jnp.uint32(4)
    return jnp.where(value < 1 << 24, fine, coarse).astype(jnp.int32)
