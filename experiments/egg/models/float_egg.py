"""EGG in real numbers: `egg` without its rounding, so that it has a gradient (EGGROLL, arXiv 2511.16652, section 6.1).

    u W / sqrt(n)                                   products, n the fan-in
    x w / max(mean |x|, 1/16)                       norms
    h' = h + (f + c) (~h - h) / 16,  c = 127 / 16   the gate, in [0, 2 c / 16] as f is in [-c, c]

Everything saturates at +-c, as in `egg`, where 16 stands for 1.0; that and the gate are the only nonlinearities. Parameters
have the names, shapes and initial values of `egg`, divided by 16. Everything is float32.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from eggroll.experiments.egg.models import egg
from eggroll.experiments.egg.models.fixed_point import FRACTIONAL_BITS, LARGEST

ONE = 2**FRACTIONAL_BITS
LIMIT = LARGEST / ONE


def from_integers(values: Any) -> Any:
    """Return int8 parameters or states of `egg` as real numbers, float32."""
    return jax.tree.map(lambda value: value.astype(jnp.float32) / ONE, values)


def init(config: egg.Config, *, key: Array) -> egg.Params:
    """Return the parameters of `egg.init` as real numbers; the key is consumed."""
    return from_integers(egg.init(config, key=key))


def init_state(config: egg.Config) -> Array:
    """Return the initial state of one stream, float32 [L, D]."""
    return from_integers(egg.init_state(config))


def step(params: egg.Params, state: Array, byte: Array) -> tuple[Array, Array]:
    """Read one byte.

    Args:
        params: as `init` returns them.
        state: float32 [L, D]; reset to zeros if the byte is the separator.
        byte: uint8 or int32 [].

    Returns:
        Logits of the next byte in bits, float32 [256], and the state after this one.
    """
    state = jnp.where(byte == egg.SEPARATOR, jnp.zeros_like(state), state)
    x = jnp.take(params["embedding"], byte, axis=0, mode="clip")

    def layer(x: Array, scanned: tuple[Any, Array]) -> tuple[Array, Array]:
        weights, h = scanned
        h = _gru(weights, _norm(x, weights["ln1"]), h)
        x = _saturate(x + h)
        return _saturate(x + _linear(_linear(_norm(x, weights["ln2"]), weights["W1"]), weights["W2"])), h

    x, state = jax.lax.scan(layer, x, (params["layers"], state))
    return _linear(_norm(x, params["ln_out"]), params["head"]), state


def sequence(params: egg.Params, state: Array, text: Array) -> tuple[Array, Array]:
    """Read a piece of text and score every byte after the first.

    Args:
        params: as `init` returns them.
        state: float32 [L, D] before the first byte.
        text: uint8 or int32 [T + 1]: bytes 0 to T - 1 are read, bytes 1 to T scored; the next piece begins with byte T.

    Returns:
        The state after byte T - 1, and float32 [T], log2 of the probability of every byte.
    """

    def read(state: Array, pair: tuple[Array, Array]) -> tuple[Array, Array]:
        logits, state = step(params, state, pair[0])
        log_likelihood = jax.nn.log_softmax(logits * math.log(2)) / math.log(2)
        return state, jnp.take(log_likelihood, pair[1], mode="clip")

    return jax.lax.scan(read, state, (text[:-1], text[1:]))


def _saturate(x: Array) -> Array:
    return jnp.clip(x, -LIMIT, LIMIT)


def _linear(x: Array, weights: Array) -> Array:
    return _saturate(x @ weights / math.sqrt(x.shape[0]))


def _gru(weights: Any, u: Array, h: Array) -> Array:
    """Return the layer's state after input u; both float32 [D]."""
    f = _saturate(_linear(u, weights["Wf"]) + _linear(h, weights["Uf"]) + weights["bf"])
    gate = (f + LIMIT) / ONE
    c = _saturate(_linear(u, weights["Wh"]) + _linear(gate * h, weights["Uh"]) + weights["bh"])
    return h + gate * (c - h)


def _norm(x: Array, weight: Array) -> Array:
    """Return x / mean |x| * weight, with a mean of at least the integer model's last bit."""
    return _saturate(x * weight / jnp.maximum(jnp.mean(jnp.abs(x)), 1 / ONE))
