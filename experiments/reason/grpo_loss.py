"""The objective of GRPO (Shao et al., arXiv 2402.03300, section 4.1): advantages of a group, log-likelihoods, the clipped loss.

    A_i  = (r_i - mean r) / (std r + 1e-6)                              over the G completions o_i of one prompt
    loss = -1/G sum_i 1/|o_i| sum_t [min(rho A_i, clip(rho, 1 - c, 1 + c) A_i) - beta D],    rho = pi(o_it) / pi_old(o_it)
    D    = pi_ref / pi - log(pi_ref / pi) - 1

pi is what completions are drawn from: softmax(logits / temperature). A token's advantage is that of its completion.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from eggroll.llm.decoder import Decoder, hidden_states, token_log_likelihood
from eggroll.llm.decoding import Completions, Prompts

EPSILON = 1e-6  # added to the standard deviation of rewards


class Drawn(NamedTuple):
    """B completions to learn from."""

    prompts: Prompts
    completions: Completions
    advantages: Any  # float32 [B]
    old: (
        Array | None
    )  # float32 [B, max_new_tokens], log-likelihoods when they were drawn; None: the parameters are still the same
    reference: Array | None  # float32 [B, max_new_tokens], log-likelihoods of the reference


def log_likelihoods(decoder: Decoder, params: Any, prompts: Prompts, completions: Completions, *, temperature: float) -> Array:
    """Return the log-likelihood of every token of completions.

    Args:
        decoder: the model.
        params: its parameters.
        prompts: B prompts of T tokens, padded on the left.
        completions: theirs, int32 [B, max_new_tokens].
        temperature: that logits are divided by.

    Returns:
        float32 [B, max_new_tokens], 0 after the end of a completion.
    """
    length = completions.tokens.shape[1]
    real = jnp.arange(length, dtype=jnp.int32) < completions.length[:, None]
    tokens = jnp.concatenate([prompts.tokens, completions.tokens], axis=1)
    states = hidden_states(decoder, params, tokens, jnp.concatenate([prompts.mask, real], axis=1))[:, -length - 1 :]
    logits = decoder.logits(params["resident"], states) / temperature
    return token_log_likelihood(logits, tokens[:, -length - 1 :], jnp.pad(real, ((0, 0), (1, 0))))[:, 1:]


def advantages(rewards: np.ndarray, *, global_std: bool = False) -> np.ndarray:
    """Return rewards relative to their group: float32 [prompts, samples], exactly 0 in groups of equal rewards."""
    spread = rewards.std() if global_std else rewards.std(axis=1, keepdims=True)
    relative = (rewards - rewards.mean(axis=1, keepdims=True)) / (spread + EPSILON)
    return np.where(silent(rewards)[:, None], 0, relative).astype(np.float32)


def silent(rewards: np.ndarray) -> np.ndarray:
    """Return which groups have no signal, since all their rewards are equal: bool [prompts]."""
    return rewards.max(axis=1) == rewards.min(axis=1)


def grpo_loss(
    known: Array, drawn: Drawn, *, clip: float, token_mean: bool = False, kl_coefficient: float = 0.0
) -> tuple[Array, Array]:
    """Return the loss of B completions, and the share of tokens whose ratio the clip holds.

    Args:
        known: float32 [B, max_new_tokens], log-likelihoods of the parameters that learn.
        drawn: what they learn from.
        clip: range of the ratio around 1.
        token_mean: mean over all tokens; else over the tokens of a completion, then over completions.
        kl_coefficient: weight of the divergence, where there is a reference.
    """
    length = drawn.completions.length[:, None]
    real = (jnp.arange(known.shape[1], dtype=jnp.int32) < length).astype(known.dtype)
    weights = real / real.sum() if token_mean else real / length.astype(known.dtype) / known.shape[0]
    ratio = jnp.exp(known - (jax.lax.stop_gradient(known) if drawn.old is None else drawn.old))
    gain, held = (rho * drawn.advantages[:, None] for rho in (ratio, jnp.clip(ratio, 1 - clip, 1 + clip)))
    objective = jnp.minimum(gain, held)
    if drawn.reference is not None:
        further = drawn.reference - known
        objective = objective - kl_coefficient * (jnp.exp(further) - further - 1)
    return -jnp.sum(weights * objective), jnp.sum(jnp.where(held < gain, real, 0)) / real.sum()
