"""Complete prompts token by token: prefill once, then a loop that ends when every text has ended.

    tokens [B, room], length [B] = complete(generator, params, prompts, room=..., ending=...)

One function of one model, for unperturbed parameters and for a member of a population alike. Under `vmap` over members all of
them share one loop, which runs until the last text of the last member has ended: whether all have ended is reduced over the
members too (`all_of_everyone`), so the loop stays a loop and nothing in it is computed twice or selected. A member's factors
are drawn before the loop, once for all tokens.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from eggroll.llm.generator import Generator


class Prompts(NamedTuple):
    """B prompts, padded on the left."""

    tokens: Any  # int32 [B, T]
    mask: Any  # bool [B, T], False on padding


class Completions(NamedTuple):
    """What follows B prompts."""

    tokens: Any  # int32 [B, room]; after the end they are 0
    length: Any  # int32 [B], tokens of a completion, with the one that ends it
    ended: Any  # bool [B], False where there was no room for the end


def pad_prompts(texts: Sequence[Sequence[int]], *, length: int) -> Prompts:
    """Lay prompts side by side.

    Args:
        texts: tokens of every prompt, at least one.
        length: T of the result; the same one for all batches compiles once.

    Raises:
        ValueError: an empty prompt, or one that is longer.
    """
    tokens, mask = np.zeros((len(texts), length), np.int32), np.zeros((len(texts), length), bool)
    for row, text in enumerate(texts):
        if not 0 < len(text) <= length:
            raise ValueError(f"prompt {row} has {len(text)} tokens, expected 1 to {length}.")
        tokens[row, length - len(text) :], mask[row, length - len(text) :] = text, True
    return Prompts(tokens, mask)


@jax.custom_batching.custom_vmap
def all_of_everyone(value: Array) -> Array:
    """Whether all of `value` are true, of all members that run side by side: the result has no axis of members."""
    return jnp.all(value)


@all_of_everyone.def_vmap
def _all_of_members(_size: int, _batched: Any, value: Array) -> tuple[Array, bool]:
    return all_of_everyone(value), False


def next_token(logits: Array, key: Array | None, *, temperature: float, top_p: float) -> Array:
    """Choose a token.

    Args:
        logits: float [B, V].
        key: typed key; None where temperature is 0.
        temperature: 0: the likeliest token; else of the softmax that is drawn from.
        top_p: only the likeliest tokens that together reach this probability, in (0, 1].

    Returns:
        int32 [B].
    """
    if temperature == 0 or key is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / temperature
    if top_p < 1:
        ordered = jnp.sort(jax.nn.softmax(logits), axis=-1, descending=True)
        before = jnp.cumsum(ordered, axis=-1) - ordered  # probability of all likelier ones
        least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(jax.nn.softmax(logits) >= least, logits, -jnp.inf)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def complete(
    generator: Generator,
    params: Any,
    prompts: Prompts,
    *,
    room: int,
    ending: Sequence[int],
    key: Array | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> Completions:
    """Continue prompts until each has ended or `room` is used up.

    Args:
        generator: the model.
        params: its parameters, also those of a member.
        prompts: B prompts of T tokens.
        room: most tokens of a completion, >= 1.
        ending: tokens that end a text; none: every text uses all room.
        key: typed key, needed where temperature is not 0.
        temperature: 0: greedy.
        top_p: of the distribution that is drawn from.

    Returns:
        The completions.

    Raises:
        ValueError: room, temperature or top_p out of range, or no key to draw with.
    """
    check_sampling(room=room, temperature=temperature, top_p=top_p)
    if temperature and key is None:
        raise ValueError(f"key must be given where temperature is not 0, got None with temperature {temperature}.")
    count = prompts.tokens.shape[0]
    stops = jnp.asarray(tuple(ending), jnp.int32)
    empty = jnp.zeros((count, room), jnp.int32), jnp.zeros(count, jnp.int32), jnp.zeros(count, bool)

    def write(so_far: Completions, step: Array, logits: Array) -> tuple[Completions, Array]:
        own = None if key is None else jax.random.fold_in(key, step)
        token = jnp.where(so_far.ended, 0, next_token(logits, own, temperature=temperature, top_p=top_p))
        tokens = jax.lax.dynamic_update_slice(so_far.tokens, token[:, None], (jnp.int32(0), step))
        ended = so_far.ended | jnp.isin(token, stops)
        return Completions(tokens, so_far.length + (~so_far.ended).astype(jnp.int32), ended), token

    def going_on(run: Any) -> Array:
        step, so_far, *_ = run
        return (step < room) & ~all_of_everyone(so_far.ended)

    def extend(run: Any) -> Any:
        step, so_far, token, cache = run
        logits, cache = generator.step(params, cache, token)
        return step + 1, *write(so_far, step, logits), cache

    logits, cache = generator.prefill(params, prompts.tokens, prompts.mask, room)
    first = write(Completions(*empty), jnp.int32(0), logits)
    return jax.lax.while_loop(going_on, extend, (jnp.int32(1), *first, cache))[1]


def check_sampling(*, room: int, temperature: float, top_p: float) -> None:
    """Raise ValueError for settings that no text can be drawn with."""
    if room < 1:
        raise ValueError(f"room must be an integer >= 1, got {room}.")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be a finite number >= 0, got {temperature}.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}.")
