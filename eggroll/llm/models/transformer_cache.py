"""Continues texts with a transformer: keys and values of every token are kept, a new token looks at them.

The length that is filled is one number for all texts, so that keys of a new token are written in place, also under `vmap` over
members of a population, as long as a loop's condition is the same for all of them. The cache is a carry of the scan over
layers, not a result of it: a result would be a copy of all of it for every token.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from eggroll.llm.generator import Generator
from eggroll.llm.models import rotary
from eggroll.llm.models.attention import attend, attend_by_head, positions, visible
from eggroll.llm.models.transformer import TransformerConfig, embed, heads, logits, rest


class Cache(NamedTuple):
    """Keys and values of S = T + room tokens; those from `filled` on are zeros that no token sees."""

    k: Array  # [L, B, K, S, d], rotated
    v: Array  # [L, B, K, S, d]
    seen: Array  # bool [B, S]
    position: Array  # int32 [B], of each text's next token
    filled: Array  # int32 [], where the next token goes


def generator(config: TransformerConfig) -> Generator:
    """Return prefill and step; see `generator` for their contract. A step beyond the room overwrites the last token."""

    def prefill(params: Any, tokens: Array, mask: Array, room: int) -> tuple[Array, Cache]:
        position, seen = positions(mask), visible(mask)
        cos, sin = rotary.tables(config.rotary, position, config.head_dim)

        def layer(x: Array, own: Any) -> tuple[Array, tuple[Array, Array]]:
            q, k, v = heads(config, own, x, cos, sin)
            return rest(config, own, x, attend(q, k, v, seen)), (_by_head(k, room), _by_head(v, room))

        x, (k, v) = jax.lax.scan(layer, embed(params["resident"], tokens), params["blocks"])
        cache = Cache(k, v, jnp.pad(mask, [(0, 0), (0, room)]), position[:, -1] + 1, jnp.int32(tokens.shape[1]))
        return logits(config, params["resident"], x[:, -1:])[:, 0], cache

    def step(params: Any, cache: Cache, token: Array) -> tuple[Array, Cache]:
        at = cache.filled
        cos, sin = rotary.tables(config.rotary, cache.position[:, None], config.head_dim)
        seen = jax.lax.dynamic_update_slice(cache.seen, jnp.ones((token.shape[0], 1), bool), (0, at))

        def layer(carry: tuple[Array, Array, Array], xs: tuple[Any, Array]) -> tuple[tuple[Array, Array, Array], None]:
            (x, k, v), (own, number) = carry, xs
            q, new_k, new_v = heads(config, own, x, cos, sin)
            place = (number, 0, 0, at, 0)
            k, v = (jax.lax.dynamic_update_slice(a, n.swapaxes(1, 2)[None], place) for a, n in ((k, new_k), (v, new_v)))
            own_k, own_v = (jax.lax.dynamic_index_in_dim(a, number, keepdims=False) for a in (k, v))
            return (rest(config, own, x, attend_by_head(q, own_k, own_v, seen[:, None])), k, v), None

        first = embed(params["resident"], token[:, None]), cache.k, cache.v
        numbers = jnp.arange(config.num_hidden_layers, dtype=jnp.int32)
        (x, k, v), _ = jax.lax.scan(layer, first, (params["blocks"], numbers))
        return logits(config, params["resident"], x)[:, 0], Cache(k, v, seen, cache.position + 1, at + 1)

    return Generator(prefill, step)


def _by_head(array: Array, room: int) -> Array:
    """[B, T, K, d] to [B, K, T + room, d]."""
    return jnp.pad(array.swapaxes(1, 2), [(0, 0), (0, 0), (0, room), (0, 0)])
