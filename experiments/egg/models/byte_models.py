"""Differentiable models of bytes behind one interface: EGG in real numbers, and a small transformer.

    state, known = model.sequence(params, state, text)      log2 of the probability of every byte of a piece of text

EGG carries its state from piece to piece. The transformer has no state: it reads a piece in windows, and a byte attends only to
earlier bytes of its window.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from eggroll.experiments.egg.models import egg, float_egg
from eggroll.llm.decoder import apply, token_log_likelihood
from eggroll.llm.models.families import init_params, make_decoder
from eggroll.llm.models.transformer import TransformerConfig

HEAD_DIM = 16


class ByteModel(NamedTuple):
    """Functions of one stream of bytes."""

    init: Callable[[Array], Any]  # key -> parameters
    state: Any  # before the first byte
    sequence: Callable[[Any, Any, Array], tuple[Any, Array]]  # text uint8 [T + 1] -> state and float32 [T]


def parameter_count(model: ByteModel) -> int:
    """Return the number of trained parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0))))


def recurrent(config: egg.Config) -> ByteModel:
    """Return EGG in real numbers."""
    return ByteModel(lambda key: float_egg.init(config, key=key), float_egg.init_state(config), float_egg.sequence)


def transformer(config: TransformerConfig, *, window: int) -> ByteModel:
    """Return a small transformer.

    Args:
        config: its sizes, with a vocabulary of 256.
        window: bytes read and scored at a time; shorter pieces of text are padded.
    """
    model = make_decoder(config)

    def sequence(params: Any, state: Any, text: Array) -> tuple[Any, Array]:
        length = text.shape[0] - 1
        windows = -(-length // window)
        filled = jnp.pad(text.astype(jnp.int32), (0, windows * window - length))
        tokens = filled[window * jnp.arange(windows)[:, None] + jnp.arange(window + 1)]
        everything = jnp.ones(tokens.shape, bool)
        known = token_log_likelihood(apply(model, params, tokens, everything), tokens, everything)[:, 1:]
        return state, known.reshape(-1)[:length] / math.log(2)

    return ByteModel(lambda key: init_params(config, key=key), (), sequence)


def transformer_config(*, layers: int, width: int) -> TransformerConfig:
    """Return the sizes of a transformer with about as many parameters as EGG of the same layers and width.

    Raises:
        ValueError: width is not a multiple of HEAD_DIM.
    """
    if width < 1 or width % HEAD_DIM:
        raise ValueError(f"width must be a multiple of {HEAD_DIM} for a transformer, got {width}.")
    return TransformerConfig(
        vocab_size=egg.VOCABULARY,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD_DIM,
        num_key_value_heads=width // HEAD_DIM,
        head_dim=HEAD_DIM,
    )
