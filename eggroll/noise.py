"""Noise that is addressed, never stored.

    noise = draw(fold(key, generation, hash(path)), pair, stack index)

One address names the noise of one layer of one parameter for one antithetic pair in one generation. The bits are the same
whether the address is drawn alone, vmapped, in chunks or inside a scan, so forward pass, update, another device and a replay
agree, and adding or renaming a parameter leaves every other parameter's noise untouched. This file is the only place that
derives keys for noise; `tests/test_noise.py` pins its bits.
"""

import dataclasses
import functools
import hashlib
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

Distribution = Literal["normal", "rademacher"]
DISTRIBUTIONS: tuple[str, ...] = get_args(Distribution)
WORD = 32  # Rademacher signs packed in one uint32


def check_key(key: Array, *, name: str = "key") -> None:
    """Raise unless `key` is one typed threefry key.

    Only threefry draws the same bits vmapped and alone; `rbg` keys do not, which would break seed replay.

    Raises:
        TypeError: `key` is not a scalar typed key of the threefry2x32 implementation.
    """
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise TypeError(f"{name} must be a typed key from jax.random.key(seed), got {type(key).__name__}.")
    if key.shape != ():
        raise TypeError(f"{name} must be a single key, got an array of keys of shape {key.shape}.")
    if str(jax.random.key_impl(key)) != "threefry2x32":
        raise TypeError(f"{name} must use the threefry2x32 implementation, got {jax.random.key_impl(key)}.")


def leaf_key(key: Array, generation: Array | int, path: str) -> Array:
    """Derive the key of one parameter in one generation.

    Args:
        key: the run's typed threefry key.
        generation: int32 scalar, already divided by `noise_reuse`.
        path: the parameter's path, for example "params/Dense_0/kernel"; its first 64 SHA-256 bits enter the key.

    Returns:
        A typed key.
    """
    digest = hashlib.sha256(path.encode()).digest()
    high, low = int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:8], "big")
    key = jax.random.fold_in(key, generation)
    return jax.random.fold_in(jax.random.fold_in(key, jnp.uint32(high)), jnp.uint32(low))


def stacked_keys(key: Array, pair: Array | int, stack: tuple[int, ...]) -> Array:
    """Derive one key per stack index of one parameter for one pair.

    Args:
        key: a key from `leaf_key`.
        pair: int32 scalar, index of the antithetic pair.
        stack: sizes of the stacked axes, `()` for an unstacked parameter, whose stack index is 0.

    Returns:
        Typed keys of shape `stack`.
    """
    pair_key = jax.random.fold_in(key, pair)
    indices = jnp.arange(math.prod(stack), dtype=jnp.uint32)
    return jax.vmap(lambda index: jax.random.fold_in(pair_key, index))(indices).reshape(stack)


def _vmap_keys(draw, keys: Array) -> Array:
    drawn = jax.vmap(draw)(keys.reshape(-1))
    return drawn.reshape(keys.shape + drawn.shape[1:])


def draw_signs(keys: Array, count: int) -> Array:
    """Draw `count` Rademacher signs per key as packed bits.

    Returns:
        uint32 [*keys.shape, ceil(count / 32)]; bit i % 32 of word i // 32 set means sign i is -1.
    """
    words = -(-count // WORD)
    return _vmap_keys(lambda key: jax.random.bits(key, (words,), jnp.uint32), keys)


def unpack_signs(bits: Array, count: int, dtype: DTypeLike) -> Array:
    """Unpack `draw_signs` bits [..., words] into values +1 and -1 of `dtype`, [..., count]."""
    shifts = jnp.arange(WORD - 1, -1, -1, dtype=jnp.uint32)  # brings bit i to the sign bit of a float32
    sign_bit = (bits[..., None] << shifts) & jnp.uint32(0x80000000)
    signs = jax.lax.bitcast_convert_type(sign_bit | jnp.uint32(0x3F800000), jnp.float32)
    return signs.reshape(*bits.shape[:-1], -1)[..., :count].astype(dtype)


def draw(keys: Array, count: int, *, distribution: str, dtype: DTypeLike) -> Array:
    """Draw `count` i.i.d. zero-mean unit-variance values per key.

    Normal values are drawn in float32 and rounded to `dtype`, so the same rounded values enter the forward pass and the update.

    Args:
        keys: typed keys [...].
        count: number of values per key.
        distribution: "normal" or "rademacher".
        dtype: floating dtype of the result.

    Returns:
        [*keys.shape, count] of `dtype`.
    """
    if distribution == "rademacher":
        return unpack_signs(draw_signs(keys, count), count, dtype)
    return _vmap_keys(lambda key: jax.random.normal(key, (count,), jnp.float32), keys).astype(dtype)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["left", "right", "bits"], meta_fields=["rank", "m", "n"])
@dataclasses.dataclass(frozen=True)
class Factors:
    """Factors of low-rank noise E = left^T right / sqrt(r), kept as packed signs when they are Rademacher."""

    rank: int
    m: int
    n: int
    left: Array | None  # [stack, r, m]
    right: Array | None  # [stack, r, n]
    bits: Array | None  # uint32 [stack, words]: r m signs of left, then r n signs of right

    def unpacked(self, dtype: DTypeLike) -> tuple[Array, Array]:
        """Return (left [stack, r, m], right [stack, r, n])."""
        if self.bits is None:
            return self.left, self.right
        return _split(unpack_signs(self.bits, self.rank * (self.m + self.n), dtype), self.rank, self.m, self.n)


def _split(values: Array, rank: int, m: int, n: int) -> tuple[Array, Array]:
    left, right = values[..., : rank * m], values[..., rank * m :]
    return left.reshape(*values.shape[:-1], rank, m), right.reshape(*values.shape[:-1], rank, n)


def draw_factors(keys: Array, *, rank: int, m: int, n: int, distribution: str, dtype: DTypeLike) -> Factors:
    """Draw the factors of one parameter for one pair.

    Args:
        keys: [stack] from `stacked_keys`.
        rank, m, n: sizes; the noise is E = left^T right / sqrt(rank), [m, n].
        distribution: "normal" or "rademacher" entries of the factors.
        dtype: floating dtype of the factors.

    Returns:
        `Factors`, packed for "rademacher".
    """
    if distribution == "rademacher":
        return Factors(rank, m, n, None, None, draw_signs(keys, rank * (m + n)))
    values = draw(keys, rank * (m + n), distribution=distribution, dtype=dtype)
    return Factors(rank, m, n, *_split(values, rank, m, n), None)
