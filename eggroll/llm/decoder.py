"""A causal language model in three pure functions, with its blocks stacked along a leading axis.

    params = {"resident": {embeddings, final norm, head}, "blocks": {every leaf [num_layers, ...]}}
    x, aux = begin(resident, tokens, mask)       embeddings; aux is what every block gets (visible positions, rotary tables)
    x = block(params of one block, x, aux)       num_layers times
    logits = logits(resident, x)                 final norm and head

A tied model has no head leaf: `logits` reads the embedding, which is then one parameter with two uses.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Decoder(NamedTuple):
    """The pieces; pure functions. `aux` depends on tokens and mask only."""

    begin: Callable[[Any, Array, Array], tuple[Array, Any]]
    block: Callable[[Any, Array, Any], Array]
    logits: Callable[[Any, Array], Array]


def hidden(decoder: Decoder, params: Any, tokens: Array, mask: Array) -> Array:
    """Return what the last block gives, float [B, T, D]; `decoder.logits` of some positions of it costs less than of all."""
    x, aux = decoder.begin(params["resident"], tokens, mask)
    x, _ = jax.lax.scan(lambda x, own: (decoder.block(own, x, aux), None), x, params["blocks"])
    return x


def apply(decoder: Decoder, params: Any, tokens: Array, mask: Array) -> Array:
    """Run the whole model.

    Args:
        decoder: the model.
        params: its parameters, blocks stacked.
        tokens: int32 [B, T]; one outside the vocabulary makes the logits of its text NaN.
        mask: bool [B, T], False on padding, which no other token sees; logits on padding mean nothing.

    Returns:
        Logits of the next token, float32 [B, T, V].
    """
    return decoder.logits(params["resident"], hidden(decoder, params, tokens, mask))


def token_log_likelihood(logits: Array, tokens: Array, targets: Array) -> Array:
    """Return the log-likelihood of every target token given the tokens before it.

    Args:
        logits: float [..., T, V], each of the next token.
        tokens: int32 [..., T].
        targets: bool [..., T]; a target at position 0, which nothing precedes, counts 0.

    Returns:
        float32 [..., T], 0 where there is no target.
    """
    logits = logits[..., :-1, :].astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, tokens[..., 1:, None], axis=-1)[..., 0]
    known = jnp.where(targets[..., 1:], chosen - jax.nn.logsumexp(logits, axis=-1), 0)
    return jnp.concatenate([jnp.zeros_like(known[..., :1]), known], axis=-1)
