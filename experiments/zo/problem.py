"""The problem of `experiments.zo`: the loss of a language model on a task, in pieces, and scores of unperturbed parameters.

    classification   cross-entropy over the candidates' log-likelihoods, weight 1 per example
    generation       minus the answer's log-likelihood, weight 1 per token of it

The mean over shards of a batch is the sum of their losses over the sum of their weights.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from eggroll import zo
from eggroll.experiments.zo.data.examples import Examples
from eggroll.llm.decoder import Decoder, hidden_states

BATCH_SIZE = 100  # examples scored at a time


class Score(NamedTuple):
    """Mean loss and accuracy of examples."""

    loss: float  # mean over examples; for generation over the tokens of the answers
    accuracy: float  # share of examples whose right candidate scores highest; for generation, which greedy decoding answers


class Answers(NamedTuple):
    """Scores of the candidates of B examples."""

    scores: Array  # float32 [B, C], summed log-likelihoods
    greedy: Array  # bool [B, C], whether every token of the candidate is the likeliest


@dataclasses.dataclass(frozen=True)
class FineTuning:
    """A model and a task.

    Args:
        decoder: the model.
        train, validation, test: examples.
    """

    decoder: Decoder
    train: Examples
    validation: Examples
    test: Examples

    @functools.cached_property
    def answer_tokens(self) -> int:
        """Tokens of the longest candidate, the number of positions that need logits; if it is 1, an example is one text."""
        return max(int(part.targets.sum(axis=-1).max()) for part in (self.train, self.validation, self.test))

    def pieces(self, objective: str, *, judged: bool = False) -> zo.Blocks:
        """Return the objective, lower is better, as `(total, weight)` of a model in pieces.

        Args:
            objective: "loss", or "accuracy": the share of wrong answers, which has no gradient.
            judged: an answer whose score is NaN is a wrong one, as in `judge`; otherwise its forward has no loss.
        """
        decoder, width = self.decoder, self.answer_tokens

        def begin(resident: Any, batch: Examples, key: Array) -> tuple[Array, Any]:
            return decoder.begin(resident, *texts(batch, width=width))

        def end(resident: Any, x: Array, batch: Examples) -> tuple[Array, Array]:
            answered = answers(decoder, resident, x, batch, width=width)
            if objective == "accuracy":
                unknown = jnp.isnan(answered.scores).any(axis=1) & (not judged)
                wrong = jnp.where(unknown, jnp.nan, 1 - is_right(answered, batch).astype(jnp.float32))
                return wrong.sum(), jnp.float32(wrong.size)
            loss, weight = candidate_loss(answered.scores, batch)
            return loss.sum(), weight.sum()

        return zo.Blocks(begin, decoder.block, end)

    def judge(self) -> Callable[[Any, Examples], tuple[Array, Array]]:
        """Return a compiled function from parameters and a batch to mean loss and accuracy."""
        decoder, width = self.decoder, self.answer_tokens

        def judged(params: Any, batch: Examples) -> tuple[Array, Array]:
            x = hidden_states(decoder, params, *texts(batch, width=width))
            answered = answers(decoder, params["resident"], x, batch, width=width)
            loss, weight = candidate_loss(answered.scores, batch)
            return loss.sum() / weight.sum(), is_right(answered, batch).astype(jnp.float32).mean()

        return jax.jit(judged)


def candidate_loss(scores: Array, batch: Examples) -> tuple[Array, Array]:
    """Return loss and weight of B examples, float32 [B] each, from the log-likelihoods of their candidates [B, C]."""
    if scores.shape[1] == 1:
        return -scores[:, 0], jnp.sum(batch.targets[:, 0], axis=-1, dtype=jnp.int32).astype(jnp.float32)
    loss = jax.nn.logsumexp(scores, axis=1) - jnp.take_along_axis(scores, batch.labels[:, None], axis=1)[:, 0]
    return loss, jnp.ones_like(loss)


def texts(batch: Examples, *, width: int) -> tuple[Array, Array]:
    """Return tokens and mask of what the model reads: every candidate, or one text per example if candidates are one token.

    Args:
        batch: B examples of C candidates.
        width: tokens of the longest candidate.

    Returns:
        int32 and bool [B C, T], or [B, T] where `width` is 1.
    """
    read = (batch.tokens[:, :1], batch.mask[:, :1]) if width == 1 else (batch.tokens, batch.mask)
    tokens, mask = (array.reshape(-1, array.shape[-1]) for array in read)
    return tokens, mask


def answers(decoder: Decoder, resident: Any, x: Array, batch: Examples, *, width: int) -> Answers:
    """Score every candidate; logits are computed only at the positions that predict its tokens.

    Args:
        decoder: the model.
        resident: its parameters outside the blocks.
        x: float [B C, T, D] or [B, T, D], from the last block, for `texts`.
        batch: B examples of C candidates.
        width: tokens of the longest candidate.
    """
    first = jnp.argmax(batch.targets, axis=-1)[..., None] - 1  # [B, C, 1], the position that predicts a candidate's first token
    real = jnp.arange(width) < batch.targets.sum(axis=-1)[..., None]
    before = jnp.where(real, first + jnp.arange(width), 0)  # [B, C, width]
    flat = before[:, 0] if width == 1 else before.reshape(-1, width)
    logits = decoder.logits(resident, jnp.take_along_axis(x, flat[..., None], axis=1)).astype(jnp.float32)
    logits = logits.reshape(len(batch.labels), -1, *logits.shape[1:])  # [B, C or 1, width, V]
    wanted = jnp.take_along_axis(batch.tokens, before + 1, axis=-1)[..., None]
    chosen = jnp.take_along_axis(jnp.broadcast_to(logits, (*wanted.shape[:-1], logits.shape[-1])), wanted, axis=-1)[..., 0]
    scores = jnp.where(real, chosen - jax.nn.logsumexp(logits, axis=-1), 0).sum(axis=-1)
    return Answers(scores, jnp.where(real, chosen >= logits.max(axis=-1), True).all(axis=-1))


def is_right(answered: Answers, batch: Examples) -> Array:
    """Return whether the answer to each example is right, which it is not where a score is NaN: bool [B]."""
    if answered.scores.shape[1] == 1:
        return answered.greedy[:, 0]
    return (jnp.argmax(answered.scores, axis=1) == batch.labels) & ~jnp.isnan(answered.scores).any(axis=1)


def score(judged: Callable[[Examples], tuple[Any, Any]], examples: Examples) -> Score:
    """Score examples in batches.

    Args:
        judged: maps a batch to its mean loss and accuracy.
        examples: all of them.
    """
    count = len(examples.labels)
    parts = [Examples(*(array[first : first + BATCH_SIZE] for array in examples)) for first in range(0, count, BATCH_SIZE)]
    found = np.array([jax.device_get(judged(part)) for part in parts], np.float64)
    sizes = [len(part.labels) for part in parts]
    weights = [part.targets.sum() for part in parts] if examples.targets.shape[1] == 1 else sizes
    return Score(float(np.average(found[:, 0], weights=weights)), float(np.average(found[:, 1], weights=sizes)))
