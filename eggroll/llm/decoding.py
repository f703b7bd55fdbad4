"""Complete prompts token by token: prefill once, then a loop that ends with the last completion.

    completions = complete(generator, params, prompts, max_new_tokens=..., stop_token_ids=...)

One function of one model, for unperturbed parameters and for a member of a population alike: `es.ask(state).apply(function,
prompts)` decodes a whole population. Under `vmap` all members share one loop, which runs until the last completion of the last
member has ended. The loop's condition is reduced over members too (`all_across_members`), so it stays a loop, without a select
of finished members. The factors of a member's noise are drawn once, before the loop.
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

    tokens: Any  # int32 [B, max_new_tokens], 0 after the end
    length: Any  # int32 [B], tokens of a completion, its stop token included
    ended: Any  # bool [B], False where max_new_tokens cut the completion off


def pad_prompts(texts: Sequence[Sequence[int]], *, length: int) -> Prompts:
    """Stack prompts into one batch.

    Args:
        texts: tokens of every prompt, at least one.
        length: T of the result; use the same one for all batches, so that they compile once.

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
def all_across_members(value: Array) -> Array:
    """Return whether all of `value` is true, for all members under `vmap`: the result has no member axis."""
    return jnp.all(value)


@all_across_members.def_vmap
def _all_of_members(_size: int, _batched: Any, value: Array) -> tuple[Array, bool]:
    return all_across_members(value), False


def next_token(logits: Array, key: Array | None, *, temperature: float, top_p: float) -> Array:
    """Choose a token.

    Args:
        logits: float [B, V].
        key: typed key; None where temperature is 0.
        temperature: 0: the likeliest token; otherwise draw from softmax(logits / temperature).
        top_p: draw from the likeliest tokens that together reach this probability, in (0, 1].

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
    max_new_tokens: int,
    stop_token_ids: Sequence[int],
    key: Array | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> Completions:
    """Continue prompts until each completion has ended or has `max_new_tokens` tokens.

    Args:
        generator: the model.
        params: its parameters, or those of a member of a population.
        prompts: B prompts of T tokens.
        max_new_tokens: most tokens of a completion, >= 1.
        stop_token_ids: tokens that end a completion; empty: every completion has max_new_tokens tokens.
        key: typed key, needed where temperature is not 0.
        temperature: 0: greedy.
        top_p: see `next_token`.

    Returns:
        The completions.

    Raises:
        ValueError: max_new_tokens, temperature or top_p out of range, a top_p for greedy completions, or no key to draw with.
    """
    check_sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    if temperature and key is None:
        raise ValueError(f"key must be given where temperature is not 0, got None with temperature {temperature}.")
    count = prompts.tokens.shape[0]
    stops = jnp.asarray(tuple(stop_token_ids), jnp.int32)
    empty = jnp.zeros((count, max_new_tokens), jnp.int32), jnp.zeros(count, jnp.int32), jnp.zeros(count, bool)

    def write(so_far: Completions, step: Array, logits: Array) -> tuple[Completions, Array]:
        token_key = None if key is None else jax.random.fold_in(key, step)
        token = jnp.where(so_far.ended, 0, next_token(logits, token_key, temperature=temperature, top_p=top_p))
        tokens = jax.lax.dynamic_update_slice(so_far.tokens, token[:, None], (jnp.int32(0), step))
        ended = so_far.ended | jnp.isin(token, stops)
        return Completions(tokens, so_far.length + (~so_far.ended).astype(jnp.int32), ended), token

    def unfinished(run: Any) -> Array:
        step, so_far, *_ = run
        return (step < max_new_tokens) & ~all_across_members(so_far.ended)

    def extend(run: Any) -> Any:
        step, so_far, token, cache = run
        logits, cache = generator.step(params, cache, token)
        return step + 1, *write(so_far, step, logits), cache

    logits, cache = generator.prefill(params, prompts.tokens, prompts.mask, max_new_tokens)
    first = write(Completions(*empty), jnp.int32(0), logits)
    return jax.lax.while_loop(unfinished, extend, (jnp.int32(1), *first, cache))[1]


def check_sampling(*, max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Raise ValueError where a sampling setting is out of range or has no effect."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be an integer >= 1, got {max_new_tokens}.")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be a finite number >= 0, got {temperature}.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}.")
    if top_p < 1 and not temperature:
        raise ValueError("top_p has no effect with temperature 0, where the likeliest token is taken; give a temperature.")
