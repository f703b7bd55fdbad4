"""EGG, the byte-level recurrent language model whose parameters, state and arithmetic are integers (EGGROLL, arXiv 2511.16652,
section 6.1 and appendices G to I).

    u = norm(x; ln1)                                           every x int8 [D], 16 stands for 1.0
    f = u Wf + h Uf + bf          g  = (f + 127) h / 256        h the layer's state
    c = u Wh + g Uh + bh          h' = h + (f + 127) (c - h) / 256
    x = x + h'
    x = x + (norm(x; ln2) W1) W2                               L layers of this
    logits = norm(x; ln_out) H                                 int8 [256], base 2, 16 stands for one bit

Sums saturate at +-127, which is the only nonlinearity apart from the gate. The model is a plain function of the parameters of
one member; `fixed_point` has the arithmetic, `integer_loss` the loss, docs/integer.md the bounds. The layers are a scan, which
for a population on CPU is twice as fast as unrolled layers (experiments/LOG.md).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from eggroll.experiments.egg.models.fixed_point import (
    FRACTIONAL_BITS,
    LARGEST,
    Rounding,
    check_rounding,
    product,
    rescale,
    saturate,
    saturating_sum,
    shift_right,
)
from eggroll.experiments.egg.models.integer_loss import MAX_TOKENS, log_likelihood

Params = Any  # int8 leaves, see `init`
VOCABULARY = 256
SEPARATOR = 0  # the first byte of a document; the state is reset before it
EXPANSION = 4  # hidden width of the MLP
_NORM_BITS = 16
MAX_WIDTH = (2**31 - 1) // (
    2**_NORM_BITS + LARGEST
)  # 32,704: D 2^16 + D 127 of `_norm` fits int32, and so do sums of 4 D products


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of a model.

    Args:
        layers: L, >= 1.
        width: D, from 1 to MAX_WIDTH.
        rounding: "nearest", or "floor" as in the paper's code.

    Raises:
        ValueError: a value out of range.
    """

    layers: int
    width: int
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        if not isinstance(self.layers, int) or self.layers < 1:
            raise ValueError(f"layers must be an integer >= 1, got {self.layers!r}.")
        if not isinstance(self.width, int) or not 1 <= self.width <= MAX_WIDTH:
            raise ValueError(f"width must be an integer from 1 to {MAX_WIDTH}, where int32 sums still fit, got {self.width!r}.")
        check_rounding(self.rounding)


def init(config: Config, *, key: Array) -> Params:
    """Draw parameters: matrices round(16 N(0, 1)), biases 0, weights of the norms 1.0.

    Args:
        config: the shape.
        key: typed key, consumed.

    Returns:
        int8 leaves, those of the layers stacked on a leading axis L.
    """
    D, L = config.width, config.layers
    shapes = {name: (L, D, D) for name in ("Wf", "Uf", "Wh", "Uh")} | {"W1": (L, D, EXPANSION * D), "W2": (L, EXPANSION * D, D)}
    keys = iter(jax.random.split(key, len(shapes) + 2))

    def matrix(shape: tuple[int, ...]) -> Array:
        return saturate(jnp.round(2**FRACTIONAL_BITS * jax.random.normal(next(keys), shape)).astype(jnp.int32))

    one, zero = jnp.full((L, D), 2**FRACTIONAL_BITS, jnp.int8), jnp.zeros((L, D), jnp.int8)
    return {
        "embedding": matrix((VOCABULARY, D)),
        "layers": {name: matrix(shape) for name, shape in shapes.items()} | {"ln1": one, "ln2": one, "bf": zero, "bh": zero},
        "ln_out": one[0],
        "head": matrix((D, VOCABULARY)),
    }


def init_state(config: Config) -> Array:
    """Return the initial state of one member, int8 [L, D]."""
    return jnp.zeros((config.layers, config.width), jnp.int8)


def step(params: Params, state: Array, byte: Array, config: Config) -> tuple[Array, Array]:
    """Read one byte.

    Args:
        params: as `init` returns them.
        state: int8 [L, D]; reset to zeros if the byte is the separator.
        byte: uint8 or int32 [].
        config: the model's.

    Returns:
        Logits of the next byte, int8 [256], and the state after this one.
    """
    state = jnp.where(byte == SEPARATOR, jnp.zeros_like(state), state)
    x = jnp.take(params["embedding"], byte, axis=0, mode="clip")

    def layer(x: Array, scanned: tuple[Any, Array]) -> tuple[Array, Array]:
        weights, h = scanned
        h = _gru(weights, _norm(x, weights["ln1"], config.rounding), h, config.rounding)
        x = saturating_sum(x, h)
        hidden = _linear(_norm(x, weights["ln2"], config.rounding), weights["W1"], config.rounding)
        return saturating_sum(x, _linear(hidden, weights["W2"], config.rounding)), h

    x, state = jax.lax.scan(layer, x, (params["layers"], state))
    return _linear(_norm(x, params["ln_out"], config.rounding), params["head"], config.rounding), state


def sequence(params: Params, state: Array, text: Array, config: Config) -> tuple[Array, Array]:
    """Read a piece of text and score every byte after the first.

    Args:
        params: as `init` returns them.
        state: int8 [L, D] before the first byte.
        text: uint8 or int32 [T + 1]: bytes 0 to T - 1 are read, bytes 1 to T scored; the next piece begins with byte T.
        config: the model's.

    Returns:
        The state after byte T - 1, and int32 [T], the log-likelihoods in units of `integer_loss.UNITS_PER_BIT`.

    Raises:
        ValueError: fewer than two bytes, or more than int32 sums of the log-likelihoods allow.
    """
    tokens = text.shape[0] - 1
    if not 1 <= tokens <= MAX_TOKENS:
        raise ValueError(
            f"text must have from 2 to {MAX_TOKENS + 1} bytes, so that log-likelihoods sum in int32, got {tokens + 1}."
        )

    def read(state: Array, pair: tuple[Array, Array]) -> tuple[Array, Array]:
        logits, state = step(params, state, pair[0], config)
        return state, log_likelihood(logits, pair[1], rounding=config.rounding)

    return jax.lax.scan(read, state, (text[:-1], text[1:]))


def _linear(x: Array, weights: Array, rounding: Rounding) -> Array:
    return rescale(product(x, weights), x.shape[0], rounding=rounding)


def _gru(weights: Any, u: Array, h: Array, rounding: Rounding) -> Array:
    """Return the layer's state after input u; both int8 [D]."""
    f = saturating_sum(_linear(u, weights["Wf"], rounding), _linear(h, weights["Uf"], rounding), weights["bf"])
    gate, old = f.astype(jnp.int32) + LARGEST, h.astype(jnp.int32)
    g = shift_right(gate * old, 8, rounding=rounding).astype(jnp.int8)
    c = saturating_sum(_linear(u, weights["Wh"], rounding), _linear(g, weights["Uh"], rounding), weights["bh"])
    return (old + shift_right(gate * (c.astype(jnp.int32) - old), 8, rounding=rounding)).astype(jnp.int8)


def _norm(x: Array, weight: Array, rounding: Rounding) -> Array:
    """Return x / mean |x| * weight, with a mean of at least one unit of the last bit; int8 [D].

    Rounding to nearest takes one division per vector, 1 / mean in 16 bits, an error of at most 0.124 of the last bit.
    """
    wide = x.astype(jnp.int32)
    total, D = jnp.sum(jnp.abs(wide)), x.shape[0]
    weighted = wide * weight.astype(jnp.int32)
    if rounding == "floor":
        return saturate(weighted // jnp.maximum(total // D, 1))
    total = jnp.maximum(total, D)
    reciprocal = jax.lax.div((D << _NORM_BITS) + (total >> 1), total)
    return saturate(shift_right(weighted * reciprocal, _NORM_BITS, rounding=rounding))
