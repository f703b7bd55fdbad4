"""A causal language model in three pure functions, with its blocks stacked along a leading axis.

    params = {"resident": {embeddings, final norm, head}, "blocks": {every leaf [num_layers, ...]}}
    x, aux = begin(resident, tokens, mask)       embeddings; aux goes to every block (causal mask, rotary tables)
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
    """The three functions, all pure: B texts of T tokens, width D, vocabulary V; `x` is in the dtype of the parameters.

    `begin` takes int32 tokens [B, T] and a bool mask [B, T], False on padding; `aux` depends on these alone. `logits` takes any
    positions of the last block's output.
    """

    begin: Callable[[Any, Array, Array], tuple[Array, Any]]  # (resident, tokens, mask) -> (x [B, T, D], aux)
    block: Callable[[Any, Array, Any], Array]  # (parameters of one block, x [B, T, D], aux) -> x [B, T, D]
    logits: Callable[[Any, Array], Array]  # (resident, x [B, T, D]) -> float32 [B, T, V], of the token after each position


def hidden_states(decoder: Decoder, params: Any, tokens: Array, mask: Array) -> Array:
    """Return the output of the last block, float [B, T, D].

    `decoder.logits` of a few of its positions costs less than the logits of all positions that `apply` computes.
    """
    x, aux = decoder.begin(params["resident"], tokens, mask)
    x, _ = jax.lax.scan(lambda x, weights: (decoder.block(weights, x, aux), None), x, params["blocks"])
    return x


def apply(decoder: Decoder, params: Any, tokens: Array, mask: Array) -> Array:
    """Run the whole model.

    Args:
        decoder: the model.
        params: its parameters, blocks stacked.
        tokens: int32 [B, T]; a token outside the vocabulary makes the logits of its text NaN.
        mask: bool [B, T], False on padding, which no other token sees; logits on padding are meaningless.

    Returns:
        Logits of the next token, float32 [B, T, V].
    """
    return decoder.logits(params["resident"], hidden_states(decoder, params, tokens, mask))


def token_log_likelihood(logits: Array, tokens: Array, targets: Array) -> Array:
    """Return the log-likelihood of every target token given the tokens before it.

    Args:
        logits: float [..., T, V], each of the next token.
        tokens: int32 [..., T].
        targets: bool [..., T]; a target at position 0, which no token precedes, counts as 0.

    Returns:
        float32 [..., T], 0 outside the targets.
    """
    logits = logits[..., :-1, :].astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, tokens[..., 1:, None], axis=-1)[..., 0]
    log_likelihood = jnp.where(targets[..., 1:], chosen - jax.nn.logsumexp(logits, axis=-1), 0)
    return jnp.concatenate([jnp.zeros_like(log_likelihood[..., :1]), log_likelihood], axis=-1)
