"""GRPO (Shao et al., arXiv 2402.03300, section 4.1): its settings, the advantages of a group, the clipped loss.

    A_i  = (r_i - mean r) / (std r + 1e-6)                              over the G completions o_i of one prompt
    loss = -1/G sum_i 1/|o_i| sum_t [min(rho A_i, clip(rho, 1 - c, 1 + c) A_i) - beta D],    rho = pi(o_it) / pi_old(o_it)
    D    = pi_ref / pi - log(pi_ref / pi) - 1

pi is what completions are drawn from, softmax(logits / temperature). A token has the advantage of its completion.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from eggroll.llm.decoder import Decoder, hidden_states, token_log_likelihood
from eggroll.llm.decoding import Completions, Prompts

EPSILON = 1e-6  # added to the standard deviation of rewards


@dataclasses.dataclass(frozen=True)
class GRPO:
    """Settings of GRPO."""

    prompts: int = 32
    """Problems of a step."""
    samples: int = 8
    """Completions of every problem, at least 2."""
    epochs: int = 1
    """Passes over the completions of a step."""
    minibatches: int = 1
    """Minibatches of a pass; divides prompts * samples."""
    microbatches: int = 1
    """Parts of a minibatch whose gradients are added up one after the other: the same step in less memory."""
    optimizer: Literal["adam", "radam"] = "adam"
    """Adam or RAdam."""
    learning_rate: float = 3e-4
    """Step size."""
    clip: float = 0.2
    """Range of the probability ratio around 1."""
    global_std: bool = False
    """Divide by the standard deviation of all rewards of a step instead of a prompt's."""
    token_mean: bool = False
    """Average over all tokens of a minibatch; otherwise over the tokens of a completion, then over completions."""
    kl_coefficient: float = 0.0
    """Weight of the divergence from the initial parameters."""
    max_gradient_norm: float = 1.0
    """Gradients are clipped to this global norm."""

    def check(self) -> None:
        """Raise ValueError for settings out of range."""
        for name, least in (("prompts", 1), ("samples", 2), ("epochs", 1), ("minibatches", 1), ("microbatches", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"grpo.{name} must be an integer >= {least}, got {getattr(self, name)}.")
        if self.prompts * self.samples % self.minibatches:
            raise ValueError(
                f"grpo.minibatches must divide the {self.prompts * self.samples} completions of a step, got {self.minibatches}."
            )
        size = self.prompts * self.samples // self.minibatches
        if size % self.microbatches:
            raise ValueError(f"grpo.microbatches must divide the {size} completions of a minibatch, got {self.microbatches}.")
        if self.optimizer not in ("adam", "radam"):
            raise ValueError(f"grpo.optimizer must be adam or radam, got {self.optimizer!r}.")
        for name in ("learning_rate", "clip", "max_gradient_norm"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"grpo.{name} must be a finite number > 0, got {getattr(self, name)}.")
        if not 0 <= self.kl_coefficient < float("inf"):
            raise ValueError(f"grpo.kl_coefficient must be a finite number >= 0, got {self.kl_coefficient}.")


class Batch(NamedTuple):
    """A batch of B completions to learn from."""

    prompts: Prompts
    completions: Completions
    advantages: Any  # float32 [B]
    old: Array | None  # float32 [B, max_new_tokens], log-likelihoods when drawn; None: those of the current parameters
    reference: Array | None  # float32 [B, max_new_tokens], log-likelihoods of the reference


def log_likelihoods(decoder: Decoder, params: Any, prompts: Prompts, completions: Completions, *, temperature: float) -> Array:
    """Return the log-likelihood of every token of completions.

    Args:
        decoder: the model.
        params: its parameters.
        prompts: B prompts of T tokens, padded on the left.
        completions: their completions, tokens int32 [B, max_new_tokens].
        temperature: divides the logits.

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
    return np.where(groups_without_signal(rewards)[:, None], 0, relative).astype(np.float32)


def groups_without_signal(rewards: np.ndarray) -> np.ndarray:
    """Return which groups have equal rewards, and thus no signal: bool [prompts]."""
    return rewards.max(axis=1) == rewards.min(axis=1)


def grpo_loss(
    log_likelihood: Array, batch: Batch, *, clip: float, token_mean: bool = False, kl_coefficient: float = 0.0
) -> tuple[Array, Array]:
    """Return the loss of B completions, and the share of tokens whose ratio is clipped.

    Args:
        log_likelihood: float32 [B, max_new_tokens], under the parameters to be trained.
        batch: what they learn from.
        clip: range of the ratio around 1.
        token_mean: average over all tokens; otherwise over the tokens of a completion, then over completions.
        kl_coefficient: weight of the divergence, if there is a reference.
    """
    length = batch.completions.length[:, None]
    real = (jnp.arange(log_likelihood.shape[1], dtype=jnp.int32) < length).astype(log_likelihood.dtype)
    weights = real / real.sum() if token_mean else real / length.astype(log_likelihood.dtype) / log_likelihood.shape[0]
    ratio = jnp.exp(log_likelihood - (jax.lax.stop_gradient(log_likelihood) if batch.old is None else batch.old))
    gain, clipped_gain = (rho * batch.advantages[:, None] for rho in (ratio, jnp.clip(ratio, 1 - clip, 1 + clip)))
    objective = jnp.minimum(gain, clipped_gain)
    if batch.reference is not None:
        log_ratio = batch.reference - log_likelihood
        objective = objective - kl_coefficient * (jnp.exp(log_ratio) - log_ratio - 1)
    return -jnp.sum(weights * objective), jnp.sum(jnp.where(clipped_gain < gain, real, 0)) / real.sum()
