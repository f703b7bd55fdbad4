"""The forms in which a kernel reads the noise of a population: as values, as packed signs, or as keys to draw the signs from.

    Values      left [P, r, m] and right [P, r, n]
    Signs       uint32 [P, r (m + n) / 32]: r m signs of left, then r n of right; sign i is -1 where bit i % 32 of word
                i // 32 is set
    SignKeys    uint32 [P, 2]: word i of pair p is half i % 2 of threefry2x32(keys[p], (0, i // 2))

Every form has an exact meaning in terms of the one before it, so a kernel that reads keys, one that reads words and one that
reads values agree bit for bit; so does the engine, whose addresses these keys are.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.extend.random import threefry2x32_p
from jax.typing import DTypeLike

WORD = 32  # signs in one word


class Values(NamedTuple):
    """Both factors."""

    left: Array  # [P, r, m]
    right: Array  # [P, r, n]


class Signs(NamedTuple):
    """Packed Rademacher factors."""

    words: Array  # uint32 [P, r (m + n) / 32]


class SignKeys(NamedTuple):
    """Keys of Rademacher factors, one address a pair."""

    keys: Array  # uint32 [P, 2]


Noise = Values | Signs | SignKeys


def num_pairs(noise: Noise) -> int:
    """P."""
    return noise[0].shape[0]


def signs_of(noise: Signs | SignKeys, count: int) -> Signs:
    """The packed signs, drawn where the noise is keys.

    Args:
        noise: packed or keys.
        count: signs a pair, r (m + n).
    """
    if isinstance(noise, Signs):
        return noise
    calls = jnp.arange(-(-count // (2 * WORD)), dtype=jnp.uint32)
    keys = jnp.broadcast_to(noise.keys[:, None], (*noise.keys.shape[:1], calls.size, 2))
    counters = jnp.broadcast_to(calls, keys.shape[:-1])
    words = jnp.stack(threefry2x32_p.bind(keys[..., 0], keys[..., 1], jnp.zeros_like(counters), counters), axis=-1)
    return Signs(words.reshape(words.shape[0], -1)[:, : -(-count // WORD)])


def values_of(noise: Noise, *, rank: int, rows: int, columns: int, dtype: DTypeLike) -> Values:
    """The factors as values of `dtype`.

    Args:
        noise: any form.
        rank: r.
        rows: m.
        columns: n.
        dtype: of the result.
    """
    if isinstance(noise, Values):
        return Values(noise.left.astype(dtype), noise.right.astype(dtype))
    words = signs_of(noise, rank * (rows + columns)).words
    shifts = jnp.arange(WORD, dtype=jnp.uint32)
    bits = (words[..., None] >> shifts).reshape(words.shape[0], -1) & jnp.uint32(1)
    signs = (1 - 2 * bits.astype(jnp.int8)).astype(dtype)
    left, right = signs[:, : rank * rows], signs[:, rank * rows : rank * (rows + columns)]
    return Values(left.reshape(-1, rank, rows), right.reshape(-1, rank, columns))
