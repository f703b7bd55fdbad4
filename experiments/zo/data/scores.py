"""Losses of a task from logits: pure functions of arrays, one value an example, so that shards can be summed.

classification   cross-entropy over the candidates' log-likelihoods, weight 1 an example
generation       minus the answer's log-likelihood, weight 1 a token of it
mean over shards sum of sum(loss) / sum of sum(weight)
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from eggroll.experiments.zo.data.examples import Examples
from eggroll.llm.decoder import token_log_likelihood


class Losses(NamedTuple):
    """Per example, float32 [B]."""

    loss: Array
    weight: Array  # what the loss counts in a mean
    tokens: Array  # tokens that the loss looked at, all candidates together


def candidate_scores(model: Callable[[Array, Array], Array], batch: Examples, *, per_token: bool = False) -> Array:
    """Score every candidate with one pass of the model over all of them.

    Args:
        model: tokens int32 [N, T] and mask bool [N, T] -> logits [N, T, V].
        batch: B examples.
        per_token: the mean over a candidate's tokens in place of the sum; for candidates of unequal length.

    Returns:
        Log-likelihoods, float32 [B, C].
    """
    flat = [array.reshape(-1, array.shape[-1]) for array in (batch.tokens, batch.mask)]
    logits = model(*flat).reshape(*batch.tokens.shape, -1)
    total = jnp.sum(token_log_likelihood(logits, batch.tokens, batch.targets), axis=-1)
    return total / _count(batch.targets) if per_token else total


def _count(targets: Array) -> Array:
    return jnp.sum(targets, axis=-1, dtype=jnp.int32).astype(jnp.float32)


def classification_loss(scores: Array, batch: Examples) -> Losses:
    """Cross-entropy of the right candidate among all, from `candidate_scores` [B, C]."""
    right = jnp.take_along_axis(scores, batch.labels[:, None], axis=1)[:, 0]
    loss = jax.nn.logsumexp(scores, axis=1) - right
    return Losses(loss, jnp.ones_like(loss), jnp.sum(_count(batch.targets), axis=1))


def generation_loss(scores: Array, batch: Examples) -> Losses:
    """Minus the summed log-likelihood of the only candidate, from `candidate_scores` [B, 1]."""
    count = _count(batch.targets)[:, 0]
    return Losses(-scores[:, 0], count, count)


def task_loss(scores: Array, batch: Examples) -> Losses:
    """`generation_loss` of one candidate, `classification_loss` of several; scores are sums over tokens."""
    return (generation_loss if scores.shape[1] == 1 else classification_loss)(scores, batch)


def mean_loss(losses: Losses) -> Array:
    """Weighted mean, a scalar: over examples for classification, over tokens for generation."""
    return jnp.sum(losses.loss) / jnp.sum(losses.weight)


def predictions(scores: Array) -> Array:
    """The candidate with the highest score, int32 [B]."""
    return jnp.argmax(scores, axis=1).astype(jnp.int32)


def accuracy(scores: Array, batch: Examples) -> Array:
    """Share of examples whose right candidate scores highest, a scalar."""
    return jnp.mean((predictions(scores) == batch.labels).astype(jnp.float32))
