"""Noise that is addressed, never stored.

    generation key = F(run key, (0, generation))         F = threefry2x32 of (key, counter), 64 bits to 64 bits
    leaf key       = F(generation key, SHA-256(path))    first 64 bits
    address key    = F(leaf key, (pair, stack index))
    words          = F(address key, (0, i)), i = 0, 1, ...

One address names the noise of one layer of one parameter for one antithetic pair in one generation. The words are the same
whether an address is drawn alone, vmapped, in chunks, inside a scan or together with others, so forward pass, update, another
device and a replay agree, and adding or renaming a parameter leaves every other parameter's noise untouched. This file is the
only place that derives noise; `tests/eggroll/noise/test_noise.py` pins its bits.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.random import threefry2x32_p
from jax.typing import DTypeLike

from eggroll.kernels.threefry import threefry
from eggroll.noise.once import computed_once

Distribution = Literal["normal", "rademacher"]
DISTRIBUTIONS: tuple[str, ...] = get_args(Distribution)
WORD = 32  # Rademacher signs packed in one uint32


def check_key(key: Array, *, name: str = "key") -> None:
    """Raise unless `key` is one typed threefry key.

    Raises:
        TypeError: `key` is not a scalar typed key of the threefry2x32 implementation.
    """
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise TypeError(f"{name} must be a typed key from jax.random.key(seed), got {type(key).__name__}.")
    if key.shape != ():
        raise TypeError(f"{name} must be a single key, got an array of keys of shape {key.shape}.")
    if key.dtype != jax.random.key(0, impl="threefry2x32").dtype:
        raise TypeError(f"{name} must use the threefry2x32 implementation, got {key.dtype}.")


def stream_key(key: Array, stream: int) -> Array:
    """Derive a typed key for other draws: 1 evaluation, 2 rounding, 3 shared right factors, 4 shared noise.

    They are disjoint from noise addresses.
    """
    data = _threefry([(jax.random.key_data(key), jnp.uint32(stream), 0)])[0]
    return jax.random.wrap_key_data(data, impl="threefry2x32")


def leaf_keys(key: Array, generation: Array | int, paths: Sequence[str]) -> list[Array]:
    """Derive the key of every parameter in one generation.

    Args:
        key: the run's typed threefry key.
        generation: int32 scalar, already divided by `noise_reuse`.
        paths: the parameters' paths, for example "params/Dense_0/kernel".

    Returns:
        One uint32 [2] per path.
    """
    generation_key = _threefry([(jax.random.key_data(key), 0, generation)])[0]
    hashes = [hashlib.sha256(path.encode()).digest() for path in paths]
    words = [(int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:8], "big")) for digest in hashes]
    return _threefry([(generation_key, jnp.uint32(high), jnp.uint32(low)) for high, low in words])


def address_keys(
    keys: Sequence[Array], pair: Array | int, stacks: Sequence[tuple[int, ...]], *, first_index: Array | int = 0
) -> list[Array]:
    """Derive the keys of every layer of every parameter for one pair.

    Args:
        keys: uint32 [2] per parameter, from `leaf_keys`.
        pair: int32 scalar, index of the antithetic pair.
        stacks: sizes of each parameter's stacked axes; () for an unstacked one, whose stack index is 0.
        first_index: int32 scalar, the stack index of the first layer; not 0 for one layer out of a stack.

    Returns:
        uint32 [*stack, 2] per parameter.
    """
    requests = []
    for key, stack in zip(keys, stacks, strict=True):
        index = jnp.asarray(first_index).astype(jnp.uint32) + jnp.arange(math.prod(stack), dtype=jnp.uint32).reshape(stack)
        requests.append((jnp.broadcast_to(key, (*stack, 2)), pair, index))
    return _threefry(requests)


def layer_keys(key: Array, pair: Array | int, index: Array) -> Array:
    """Derive the keys of some layers of one parameter for one pair.

    Args:
        key: uint32 [2], from `leaf_keys`.
        pair: int32 scalar, index of the antithetic pair.
        index: uint32 [*stack], the stack indices of the layers; () for an unstacked parameter, whose index is 0.

    Returns:
        uint32 [*stack, 2].
    """
    return _threefry([(jnp.broadcast_to(key, (*index.shape, 2)), pair, index)])[0]


def draw_words(keys: Sequence[Array], counts: Sequence[int], *, first: Array | int = 0) -> list[Array]:
    """Draw random words for several addresses at once; the words do not depend on what else is drawn.

    Args:
        keys: uint32 [*stack, 2] per parameter, from `address_keys`.
        counts: words wanted per address of each parameter.
        first: index of the first word, even.

    Returns:
        uint32 [*stack, count] per parameter.
    """
    requests = []
    for key, count in zip(keys, counts, strict=True):
        key = jnp.broadcast_to(key[..., None, :], (*key.shape[:-1], -(-count // 2), 2))
        requests.append((key, 0, jnp.asarray(first).astype(jnp.uint32) // 2 + jnp.arange(-(-count // 2), dtype=jnp.uint32)))
    words = _threefry(requests)
    return [w.reshape(*w.shape[:-2], -1)[..., :count] for w, count in zip(words, counts, strict=True)]


@jax.jit
def words_at(keys: Array, index: Array) -> Array:
    """The words of `draw_words` at given indices, each computed on its own.

    XLA fuses this into what reads the words: no counters, keys or words are arrays in memory. A reader that reads a value more
    than once computes it again, unless `once.computed_once` stands between.

    Args:
        keys: uint32 [..., 2], from `address_keys` or `layer_keys`.
        index: uint32, of a shape that broadcasts with `keys[..., 0]`.

    Returns:
        uint32, of the common shape.
    """
    words = threefry((keys[..., 0], keys[..., 1]), index >> 1)
    return jnp.where(index & 1 == 0, *words)


def _threefry(requests: Sequence[tuple[Array, Array | int, Array | int]]) -> list[Array]:
    """F for several (key [..., 2], high, low), as one call: small calls are expensive on CPU. Returns uint32 [..., 2] each."""
    columns = []
    for key, high, low in requests:
        counters = [jnp.broadcast_to(jnp.asarray(c).astype(jnp.uint32), key.shape[:-1]) for c in (high, low)]
        columns.append([x.reshape(-1) for x in (key[..., 0], key[..., 1], *counters)])
    mixed = _mix(*(jnp.concatenate(parts) for parts in zip(*columns, strict=True)))
    sizes = [math.prod(key.shape[:-1]) for key, _, _ in requests]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [
        mixed[start : start + size].reshape(*key.shape[:-1], 2)
        for start, size, (key, _, _) in zip(starts, sizes, requests, strict=True)
    ]


@jax.jit
def _mix(*operands: Array) -> Array:
    """F of keys and counters, each uint32 [n] in two halves: uint32 [n, 2]."""
    if jax.default_backend() != "cpu":
        zero = sum((x & jnp.uint32(0) for x in operands), start=jnp.uint32(0))  # the primitive needs all vmapped alike
        return jnp.stack(threefry2x32_p.bind(*(x + zero for x in operands)), axis=-1)
    *key, high, low = (x[..., None] for x in operands)
    words = threefry((key[0], key[1]), jnp.broadcast_to(low, (*operands[0].shape, 2)), high=high)
    return computed_once(jnp.where(jnp.arange(2) == 0, *words))  # each half of a pair draws both: one loop, no interleaving


def words_needed(count: int, distribution: str) -> int:
    """Words that `decode` needs for `count` values."""
    return -(-count // WORD) if distribution == "rademacher" else count


def decode(words: Array, count: int, *, distribution: str, dtype: DTypeLike) -> Array:
    """Turn random words into i.i.d. zero-mean unit-variance values.

    Rademacher value i is -1 when bit i % 32 of word i // 32 is set. Normal values take one word each, by the inverse error
    function of 23 bits in float32, and are rounded to `dtype`, so the forward pass and the update see the same values.

    Args:
        words: uint32 [..., words_needed(count, distribution)].
        count: values wanted.
        distribution: "normal" or "rademacher".
        dtype: floating dtype of the result.

    Returns:
        [..., count] of `dtype`.
    """
    if distribution == "rademacher":
        values = _signs(words[..., None], -1)[..., :count]
    else:
        uniform = ((words >> 9).astype(jnp.float32) + 0.5) * 2.0**-22 - 1.0  # in (-1, 1), symmetric
        values = math.sqrt(2.0) * jax.lax.erf_inv(uniform)
    return values.astype(dtype)


def _signs(words: Array, axis: int) -> Array:
    """Signs of all bits of words: float32, the 1 at `axis` and the axis before it being one of 32 times as many."""
    shifts = jnp.arange(WORD - 1, -1, -1, dtype=jnp.uint32)  # brings bit i to the sign bit of a float32
    sign_bit = (words << jnp.expand_dims(shifts, [*range(axis + 1, 0)])) & jnp.uint32(0x80000000)
    signs = jax.lax.bitcast_convert_type(sign_bit | jnp.uint32(0x3F800000), jnp.float32)
    return jax.lax.collapse(signs, axis - 1 + signs.ndim, axis + 1 + signs.ndim)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["left", "right", "words"], meta_fields=["rank", "m", "n"])
@dataclasses.dataclass(frozen=True)
class Factors:
    """Factors of low-rank noise E = left^T right / sqrt(r), kept as packed signs when they are Rademacher."""

    rank: int
    m: int
    n: int
    left: Array | None  # [*stack, r, m]
    right: Array | None  # [*stack, r, n]
    words: Array | None  # uint32 [*stack, words]: r m signs of left, then r n signs of right

    def unpack(self, dtype: DTypeLike) -> tuple[Array, Array]:
        """Return (left [*stack, r, m], right [*stack, r, n]) in `dtype`."""
        if self.words is None:
            assert self.left is not None and self.right is not None
            return self.left, self.right
        m, n = self.rank * self.m, self.rank * self.n
        if m % WORD:
            return _split(decode(self.words, m + n, distribution="rademacher", dtype=dtype), self.rank, self.m, self.n)
        parts = (self.words[..., : m // WORD], m), (self.words[..., m // WORD :], n)  # no array of both is made and cut up
        left, right = (decode(words, count, distribution="rademacher", dtype=dtype) for words, count in parts)
        return _by_rank(left, self.rank), _by_rank(right, self.rank)

    def as_matrices(self, dtype: DTypeLike) -> tuple[Array, Array]:
        """Return the factors [P, *stack, ...] of P pairs as two matrices whose product sums them, the terms ordered (r, P).

        Signs of left are decoded in this order: XLA for CPU is slow to multiply a matrix that it has to transpose.

        Returns:
            (left [*stack, m, r P], right [*stack, r P, n]) in `dtype`.
        """
        left, right = self.unpack(dtype)
        left = jnp.moveaxis(left, 0, -1)  # [*stack, r, m, P]
        if self.words is not None and self.rank * self.m % WORD == 0:
            words = computed_once(jnp.moveaxis(self.words[..., : self.rank * self.m // WORD], 0, -1))
            left = _signs(words[..., None, :], -2).reshape(left.shape).astype(dtype)
        left, right = jnp.moveaxis(left, -3, -2), jnp.moveaxis(right, 0, -2)
        return jax.lax.collapse(left, left.ndim - 2), jax.lax.collapse(right, right.ndim - 3, right.ndim - 1)


def decode_factors(words: Array, *, rank: int, m: int, n: int, distribution: str, dtype: DTypeLike) -> Factors:
    """Turn random words [*stack, words] into the factors of one parameter, left first; Rademacher signs stay packed."""
    if distribution == "rademacher":
        return Factors(rank, m, n, None, None, words)
    return split_factors(decode(words, rank * (m + n), distribution=distribution, dtype=dtype), rank=rank, m=m, n=n)


def split_factors(values: Array, *, rank: int, m: int, n: int) -> Factors:
    """Factors from their values [*stack, r (m + n)], left first."""
    return Factors(rank, m, n, *_split(values, rank, m, n), None)


def join_factors(left: Factors, right: Factors, dtype: DTypeLike) -> Factors:
    """The left factor of one noise with the right factor of another."""
    factors = left.unpack(dtype)[0], right.unpack(dtype)[1]
    return Factors(left.rank, left.m, left.n, *factors, None)


def _split(values: Array, rank: int, m: int, n: int) -> tuple[Array, Array]:
    return _by_rank(values[..., : rank * m], rank), _by_rank(values[..., rank * m :], rank)


def _by_rank(values: Array, rank: int) -> Array:
    return values.reshape(*values.shape[:-1], rank, -1)
