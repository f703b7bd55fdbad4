"""RWKV-7 (Peng et al., arXiv 2503.14456): a recurrent language model, read as plain functions of stacked layers.

    d_t = x_{t-1} - x_t                                      x the normed input; every projection reads x + mu d
    r, k0, v0 = xr Wr, xk Wk, xv Wv                          a = sigmoid(a0 + xa A1 A2), g = sigmoid(xg G1) G2
    w = exp(-e^(-1/2) sigmoid(w0 + tanh(xw W1) W2))          v = v0 + (v_first - v0) sigmoid(b0 + xv V1 V2)
    u = (k0 k_k) / |k0 k_k| of every head                    k = k0 (1 + (a - 1) k_a)
    S_t = S_{t-1} diag(w) - (S_{t-1} u) (u a)^T + v k^T      y = S_t r, float32 [H, N, N]
    x + ((norm(y) + (r . (k r_k)) v) g) Wo                   then x + relu(xk K)^2 V with a token shift of its weights

All projections of a text are products over all its tokens; only S is a scan over time. v_first is v0 of the first layer, where
the interpolation has no effect. Padding changes no state: S stays as it is, and the token shift reads zeros.
`rwkv7_fields` has the tensors and config.json.
"""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from eggroll.llm.decoder import Decoder
from eggroll.llm.generator import Generator
from eggroll.llm.int8 import matmul
from eggroll.llm.models.attention import layer_norm


@dataclasses.dataclass(frozen=True)
class RWKV7Config:
    """Sizes of a model, named as in config.json.

    Args:
        vocab_size, hidden_size, intermediate_size, num_hidden_layers: sizes.
        decay_low_rank_dim, a_low_rank_dim, v_low_rank_dim, gate_low_rank_dim: inner sizes of W1 W2, A1 A2, V1 V2, G1 G2.
        head_dim: N, a divisor of hidden_size.
        norm_eps: added to the variance in the norms; times head_dim in the norm of y.
        original_names: its file names tensors as the original RWKV-7 does; False: as flash-linear-attention does.

    Raises:
        ValueError: hidden_size is not a multiple of head_dim.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    decay_low_rank_dim: int
    a_low_rank_dim: int
    v_low_rank_dim: int
    gate_low_rank_dim: int
    head_dim: int = 64
    norm_eps: float = 1e-5
    original_names: bool = False

    model_type: ClassVar[str] = "rwkv7"
    tie_word_embeddings: ClassVar[bool] = False

    def __post_init__(self):
        if self.hidden_size % self.head_dim:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of head_dim {self.head_dim}.")


class State(NamedTuple):
    """The recurrent state of one layer, or of all layers stacked."""

    mixed: Array  # [B, D], the last normed input of the time mix
    memory: Array  # float32 [B, H, N, N], S
    fed: Array  # [B, D], the last normed input of the feed-forward


def zero_state(config: RWKV7Config, batch: int, dtype: Any) -> State:
    """Return the state of one layer before the first token."""
    heads, size = config.hidden_size // config.head_dim, config.head_dim
    last = jnp.zeros((batch, config.hidden_size), dtype)
    return State(last, jnp.zeros((batch, heads, size, size), jnp.float32), last)


def embed(config: RWKV7Config, resident: Any, tokens: Array) -> Array:
    """Look up and normalise embeddings, [B, T, D] from int32 [B, T]."""
    return _norm(config, resident, "embed_norm", jnp.take(resident["embed"], tokens, axis=0))


def layer(config: RWKV7Config, weights: Any, x: Array, first_v: Array, *, first: Array, mask: Array, state: State) -> Any:
    """Run one layer over the next T tokens.

    Args:
        config: the model's.
        weights: the layer's parameters.
        x: [B, T, D].
        first_v: [B, T, D], v0 of the first layer; not used there.
        first: bool [], or one that broadcasts to x: whether this is the first layer.
        mask: bool [B, T], False on padding, which comes before the text or after its end.
        state: of the tokens before.

    Returns:
        The output of the layer, first_v, and the state.
    """
    real = mask[..., None]
    normed = jnp.where(real, _norm(config, weights, "mix_norm", x), jnp.zeros((), x.dtype))
    mixed, first_v, memory = _time_mix(config, weights, normed, first_v, first=first, mask=mask, state=state)
    x = x + mixed
    fed = jnp.where(real, _norm(config, weights, "ffn_norm", x), jnp.zeros((), x.dtype))
    hidden = matmul(_mix(fed, _shift(fed, state.fed), weights["ffn_mix_k"]), weights["ffn_k"])
    x = x + matmul(jnp.square(jax.nn.relu(hidden)), weights["ffn_v"])
    return x, first_v, State(normed[:, -1], memory, fed[:, -1])


def _time_mix(config: RWKV7Config, weights: Any, x: Array, first_v: Array, *, first: Array, mask: Array, state: State) -> Any:
    def by_head(array: Array) -> Array:
        return array.reshape(*array.shape[:2], -1, config.head_dim)

    before = _shift(x, state.mixed)
    xr, xw, xk, xv, xa, xg = (_mix(x, before, weights[f"mix_{name}"]) for name in "rwkvag")
    r, k, v = matmul(xr, weights["r"]), matmul(xk, weights["k"]), matmul(xv, weights["v"])
    rate = jax.nn.sigmoid((weights["w0"] + matmul(jnp.tanh(matmul(xw, weights["w1"])), weights["w2"])).astype(jnp.float32))
    a = jax.nn.sigmoid(weights["a0"] + matmul(matmul(xa, weights["a1"]), weights["a2"]))
    g = matmul(jax.nn.sigmoid(matmul(xg, weights["g1"])), weights["g2"])
    first_v = jnp.where(first, v, first_v)
    v = v + (first_v - v) * jax.nn.sigmoid(weights["v0"] + matmul(matmul(xv, weights["v1"]), weights["v2"]))
    u = _normalise(by_head(k * weights["k_k"]))
    k = k * (1 + (a - 1) * weights["k_a"])
    inputs = by_head(r), by_head(jnp.exp(-math.exp(-0.5) * rate)), by_head(k), by_head(v), u, by_head(a)
    memory, y = _scan_memory(state.memory, tuple(map(_to_float32, inputs)), mask)
    y = _group_norm(config, weights, y).astype(x.dtype) + (
        jnp.sum(by_head(r * k * weights["r_k"]), -1, keepdims=True) * by_head(v)
    )
    return matmul(y.reshape(x.shape) * g, weights["o"]), first_v, memory


def _scan_memory(memory: Array, inputs: tuple[Array, ...], mask: Array) -> tuple[Array, Array]:
    """Return S after the last token, and y float32 [B, T, H, N]."""

    def read(memory: Array, now: tuple[tuple[Array, ...], Array]) -> tuple[Array, Array]:
        (r, w, k, v, u, a), real = now
        removed = jnp.einsum("bhij,bhj->bhi", memory, u)
        following = memory * w[..., None, :] - removed[..., None] * (u * a)[..., None, :] + v[..., None] * k[..., None, :]
        memory = jnp.where(real[:, None, None, None], following, memory)
        return memory, jnp.einsum("bhij,bhj->bhi", memory, r)

    over_time = jax.tree.map(lambda array: array.swapaxes(0, 1), (inputs, mask))
    memory, y = jax.lax.scan(read, memory, over_time)
    return memory, y.swapaxes(0, 1)


def logits(config: RWKV7Config, resident: Any, x: Array) -> Array:
    """Return the final norm and the head, float32 [B, T, V]."""
    x = _norm(config, resident, "final_norm", x)
    return jnp.einsum("btd,vd->btv", x, resident["head"], preferred_element_type=jnp.float32)


def make_decoder(config: RWKV7Config) -> Decoder:
    """Return the functions of whole texts; blocks pass on x, first_v and a flag that is 0 before the first block."""
    width = config.hidden_size

    def begin(resident: Any, tokens: Array, mask: Array) -> tuple[Array, Array]:
        x = embed(config, resident, tokens)
        return jnp.concatenate([x, jnp.zeros_like(x), jnp.zeros_like(x[..., :1])], axis=-1), mask

    def block(weights: Any, carried: Array, mask: Array) -> Array:
        x, first_v, later = jnp.split(carried, [width, 2 * width], axis=-1)
        state = zero_state(config, x.shape[0], x.dtype)
        x, first_v, _ = layer(config, weights, x, first_v, first=later == 0, mask=mask, state=state)
        return jnp.concatenate([x, first_v, jnp.ones_like(later)], axis=-1)

    return Decoder(begin, block, lambda resident, carried: logits(config, resident, carried[..., :width]))


def make_generator(config: RWKV7Config) -> Generator:
    """Return prefill and step; the cache is the state of all layers and does not grow with max_new_tokens."""

    def run(params: Any, tokens: Array, mask: Array, states: State) -> tuple[Array, State]:
        x = embed(config, params["resident"], tokens)

        def one(carry: tuple[Array, Array], xs: tuple[Any, Array, State]) -> tuple[tuple[Array, Array], State]:
            (x, first_v), (weights, number, state) = carry, xs
            x, first_v, state = layer(config, weights, x, first_v, first=number == 0, mask=mask, state=state)
            return (x, first_v), state

        numbers = jnp.arange(config.num_hidden_layers, dtype=jnp.int32)
        (x, _), states = jax.lax.scan(one, (x, jnp.zeros_like(x)), (params["blocks"], numbers, states))
        return logits(config, params["resident"], x[:, -1:])[:, 0], states

    def prefill(params: Any, tokens: Array, mask: Array, max_new_tokens: int) -> tuple[Array, State]:
        zeros = zero_state(config, tokens.shape[0], params["resident"]["embed"].dtype)
        every = jax.tree.map(lambda leaf: jnp.zeros((config.num_hidden_layers, *leaf.shape), leaf.dtype), zeros)
        return run(params, tokens, mask, every)

    def step(params: Any, cache: State, token: Array) -> tuple[Array, State]:
        return run(params, token[:, None], jnp.ones((token.shape[0], 1), bool), cache)

    return Generator(prefill, step)


def _norm(config: RWKV7Config, params: Any, name: str, x: Array) -> Array:
    return layer_norm(x, params[f"{name}_scale"], params[f"{name}_bias"], config.norm_eps)


def _group_norm(config: RWKV7Config, weights: Any, y: Array) -> Array:
    """Normalise every head to mean 0 and variance 1, then scale and shift; float32 [B, T, H, N]."""
    scale, bias = (weights[f"y_norm_{name}"].astype(jnp.float32).reshape(-1, config.head_dim) for name in ("scale", "bias"))
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    return y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + config.head_dim * config.norm_eps) * scale + bias


def _normalise(x: Array) -> Array:
    """Scale every head to length 1, in float32; the bound is inside the root, whose gradient at the zeros of padding is NaN."""
    wide = _to_float32(x)
    return wide / jnp.sqrt(jnp.maximum(jnp.sum(wide * wide, axis=-1, keepdims=True), 1e-24))


def _shift(x: Array, last: Array) -> Array:
    """Shift by one token; `last` comes first: [B, T, D]."""
    return jnp.concatenate([last[:, None], x[:, :-1]], axis=1)


def _mix(x: Array, before: Array, share: Array) -> Array:
    return x + (before - x) * share


def _to_float32(array: Array) -> Array:
    return array.astype(jnp.float32)
