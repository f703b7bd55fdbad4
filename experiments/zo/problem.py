"""A language model and a task as `experiments.zo` tunes them: the loss in pieces, and scores of unperturbed parameters."""

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
from eggroll.experiments.zo.data.scores import classification_loss, generation_loss
from eggroll.llm.decoder import Decoder, hidden_states

OBJECTIVES = ("loss", "accuracy")
EVALUATED = 100  # examples of a pass that scores


class Score(NamedTuple):
    """Of some examples."""

    loss: float  # mean over examples; of generation over the answers' tokens
    accuracy: float  # share of examples whose right candidate scores highest; of generation: whose answer greedy decoding gives


class Answers(NamedTuple):
    """What a model says of the candidates of B examples."""

    scores: Array  # float32 [B, C], summed log-likelihoods
    greedy: Array  # bool [B, C]: every token of the candidate is the likeliest one


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
        """Tokens of the longest candidate: so many positions of a text need logits, and one text an example where it is 1."""
        return max(int(part.targets.sum(axis=-1).max()) for part in (self.train, self.validation, self.test))

    def pieces(self, objective: str) -> zo.Blocks:
        """The objective, lower is better, as `(total, weight)` of a model in pieces.

        Args:
            objective: "loss", or "accuracy": the share of wrong answers, which has no gradient.
        """
        decoder, width = self.decoder, self.answer_tokens

        def begin(resident: Any, batch: Examples, key: Array) -> tuple[Array, Any]:
            return decoder.begin(resident, *texts(batch, width=width))

        def end(resident: Any, x: Array, batch: Examples) -> tuple[Array, Array]:
            said = answers(decoder, resident, x, batch, width=width)
            if objective == "accuracy":
                wrong = 1 - right(said, batch).astype(jnp.float32)
                return wrong.sum(), jnp.float32(wrong.size)
            loss, weight, _ = _losses(said.scores, batch)
            return loss.sum(), weight.sum()

        return zo.Blocks(begin, decoder.block, end)

    def judge(self) -> Callable[[Any, Examples], tuple[Array, Array]]:
        """A function from parameters and a batch to mean loss and accuracy, compiled."""
        decoder, width = self.decoder, self.answer_tokens

        def judged(params: Any, batch: Examples) -> tuple[Array, Array]:
            x = hidden_states(decoder, params, *texts(batch, width=width))
            said = answers(decoder, params["resident"], x, batch, width=width)
            loss, weight, _ = _losses(said.scores, batch)
            return loss.sum() / weight.sum(), right(said, batch).astype(jnp.float32).mean()

        return jax.jit(judged)


def _losses(scores: Array, batch: Examples) -> Any:
    return (generation_loss if scores.shape[1] == 1 else classification_loss)(scores, batch)


def texts(batch: Examples, *, width: int) -> tuple[Array, Array]:
    """Tokens and mask of what the model reads: every candidate, or one an example where they differ in the last token only.

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
    """Score every candidate; logits are computed where a candidate's tokens are to be predicted, and nowhere else.

    Args:
        decoder: the model.
        resident: its parameters outside of the blocks.
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


def right(said: Answers, batch: Examples) -> Array:
    """Whether an example's answer is right: bool [B]."""
    if said.scores.shape[1] == 1:
        return said.greedy[:, 0]
    return jnp.argmax(said.scores, axis=1) == batch.labels


def score(judged: Callable[[Examples], tuple[Any, Any]], examples: Examples) -> Score:
    """Score examples, some at a time.

    Args:
        judged: from a batch to its mean loss and its accuracy.
        examples: all of them.
    """
    count = len(examples.labels)
    parts = [Examples(*(array[first : first + EVALUATED] for array in examples)) for first in range(0, count, EVALUATED)]
    found = np.array([jax.device_get(judged(part)) for part in parts], np.float64)
    sizes = [len(part.labels) for part in parts]
    weights = [part.targets.sum() for part in parts] if examples.targets.shape[1] == 1 else sizes
    return Score(float(np.average(found[:, 0], weights=weights)), float(np.average(found[:, 1], weights=sizes)))
