"""Held-out text, and bits per byte of unperturbed parameters on it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from eggroll.experiments.egg.config import Config
from eggroll.experiments.egg.data.corpus import Corpus, streams
from eggroll.experiments.egg.models import egg
from eggroll.experiments.egg.models.integer_loss import MAX_TOKENS, UNITS_PER_BIT

VALIDATION_STREAMS, SHORTEST_STREAM = 1024, 64


def held_out(corpus: Corpus, limit: int) -> np.ndarray:
    """Return at most `limit` bytes of held-out text as contiguous streams side by side, uint8 [streams, T + 1]."""
    size = min(len(corpus.validation), limit)
    groups = min(VALIDATION_STREAMS, max(1, size // SHORTEST_STREAM))
    return streams(corpus, 0, groups=groups, length=min(size // groups, MAX_TOKENS), part="validation")


class Validation:
    """Bits per byte of unperturbed parameters on held-out text, many contiguous streams side by side."""

    def __init__(self, corpus: Corpus, config: Config):
        self._text = held_out(corpus, config.validation_bytes)
        self._config = config

    def __call__(self, params: egg.Params) -> float:
        """Return the bits per byte."""
        scores = np.asarray(_scores(params, self._text, self._config.model), np.int64)
        return float(-scores.sum() / UNITS_PER_BIT[self._config.rounding] / (self._text.size - len(self._text)))


@functools.partial(jax.jit, static_argnames="model")
def _scores(params: egg.Params, text: Array, model: egg.Config) -> Array:
    """Sum of the log-likelihoods of every stream."""

    def score(text: Array) -> Array:
        return jnp.sum(egg.sequence(params, egg.init_state(model), text, model)[1])

    return jax.vmap(score)(text)
