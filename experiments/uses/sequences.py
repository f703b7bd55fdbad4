"""Recurrent networks, attention, state spaces and differential equations, written out."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from eggroll.experiments.uses.use import Draw, use

SEQUENCE = "b 6 n"
RECURRENT = {"w": "n n", "u": "n n", "b": "n"}


def _over_time(step: Any, start: Any, x: Any) -> Any:
    return lax.scan(step, start, jnp.swapaxes(x, 0, 1))[1]


def _zeros(x: Any) -> Any:
    return jnp.zeros((x.shape[0], x.shape[2]))


def _rnn_step(p: Any) -> Any:
    def step(h: Any, x: Any) -> Any:
        h = jnp.tanh(x @ p["w"] + h @ p["u"] + p["b"])
        return h, h

    return step


def _rnn(p: Any, x: Any) -> Any:
    return _over_time(_rnn_step(p), _zeros(x), x)


def _rnn_from_learnt(p: Any, x: Any) -> Any:
    return _over_time(_rnn_step(p), jnp.broadcast_to(p["h0"], _zeros(x).shape), x)


def _rnn_from_learnt_vector(p: Any, x: Any) -> Any:
    """One sequence: the learnt state itself is in the carry."""
    return lax.scan(_rnn_step(p), p["h0"], x[0])[1]


def _rnn_from_learnt_matrix(p: Any, x: Any) -> Any:
    """A learnt state for every row of the batch."""
    return _over_time(_rnn_step(p), p["h0"][: x.shape[0]], x)


def _lstm(p: Any, x: Any) -> Any:
    def step(state: Any, x: Any) -> Any:
        h, c = state
        i, f, g, o = jnp.split(x @ p["w"] + h @ p["u"] + p["b"], 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    return _over_time(step, (_zeros(x), _zeros(x)), x)


def _lstm_concatenated(p: Any, x: Any) -> Any:
    """Inputs and state side by side, one matrix."""

    def step(state: Any, x: Any) -> Any:
        h, c = state
        i, f, g, o = jnp.split(jnp.concatenate([x, h], -1) @ p["w"], 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    return _over_time(step, (_zeros(x), _zeros(x)), x)


def _gru(p: Any, x: Any) -> Any:
    def step(h: Any, x: Any) -> Any:
        r, z = jnp.split(jax.nn.sigmoid(x @ p["w"] + h @ p["u"]), 2, axis=-1)
        h = (1 - z) * h + z * jnp.tanh(x @ p["v"] + (r * h) @ p["k"])
        return h, h

    return _over_time(step, _zeros(x), x)


def _attend(q: Any, k: Any, v: Any) -> Any:
    scores = jnp.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(jnp.where(causal, scores, -1e9)), v)


def _heads(x: Any, heads: int) -> Any:
    return x.reshape(*x.shape[:2], heads, -1)


def _attention(p: Any, x: Any) -> Any:
    q, k, v = (_heads(x @ p[name], 4) for name in "qkv")
    return _attend(q, k, v).reshape(x.shape) @ p["o"]


def _grouped_attention(p: Any, x: Any) -> Any:
    """Two heads of keys and values for four of queries."""
    q, k, v = _heads(x @ p["q"], 4), _heads(x @ p["k"], 2), _heads(x @ p["v"], 2)
    return _attend(q, jnp.repeat(k, 2, 2), jnp.repeat(v, 2, 2)).reshape(x.shape) @ p["o"]


def _fused_attention(p: Any, x: Any) -> Any:
    q, k, v = (_heads(part, 4) for part in jnp.split(x @ p["qkv"], 3, axis=-1))
    return _attend(q, k, v).reshape(x.shape) @ p["o"]


def _headed_attention(p: Any, x: Any) -> Any:
    q, k, v = jnp.einsum("btd,cdhk->cbthk", x, p["qkv"])
    return jnp.einsum("bthk,hkd->btd", _attend(q, k, v), p["o"])


def _library_attention(p: Any, x: Any) -> Any:
    q, k, v = (_heads(x @ p[name], 4) for name in "qkv")
    return jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape) @ p["o"]


def _rotate(x: Any) -> Any:
    angles = jnp.arange(x.shape[1])[:, None, None] * 0.1
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * jnp.cos(angles) - b * jnp.sin(angles), a * jnp.sin(angles) + b * jnp.cos(angles)], -1)


def _rotary_attention(p: Any, x: Any) -> Any:
    q, k, v = (_heads(x @ p[name], 4) for name in "qkv")
    return _attend(_rotate(q), _rotate(k), v).reshape(x.shape) @ p["o"]


def _biased_attention(p: Any, x: Any) -> Any:
    """A learnt bias of the scores for every pair of positions."""
    q, k = x @ p["q"], x @ p["k"]
    scores = jnp.einsum("btk,bsk->bts", q, k) * q.shape[-1] ** -0.5 + p["bias"]
    return jax.nn.softmax(scores) @ x


def _cached_attention(p: Any, x: Any) -> Any:
    """Decoding with a cache of keys and values in the carry."""

    def step(cache: Any, inputs: Any) -> Any:
        keys, values = cache
        t, x = inputs
        keys = lax.dynamic_update_index_in_dim(keys, x @ p["k"], t, 0)
        values = lax.dynamic_update_index_in_dim(values, x @ p["v"], t, 0)
        scores = jnp.einsum("bd,sbd->bs", x @ p["q"], keys)
        weights = jax.nn.softmax(jnp.where(jnp.arange(keys.shape[0]) <= t, scores, -1e9))
        return (keys, values), jnp.einsum("bs,sbd->bd", weights, values) @ p["o"]

    times = jnp.swapaxes(x, 0, 1)
    empty = jnp.zeros_like(times)
    return lax.scan(step, (empty, empty), (jnp.arange(times.shape[0]), times))[1]


def _linear_attention(p: Any, x: Any) -> Any:
    q, k, v = jax.nn.elu(x @ p["q"]) + 1, jax.nn.elu(x @ p["k"]) + 1, x @ p["v"]

    def step(state: Any, inputs: Any) -> Any:
        q, k, v = inputs
        state = state + jnp.einsum("bi,bj->bij", k, v)
        return state, jnp.einsum("bi,bij->bj", q, state) / (1 + q.sum(-1, keepdims=True))

    start = jnp.zeros((x.shape[0], x.shape[2], x.shape[2]))
    return lax.scan(step, start, [jnp.swapaxes(a, 0, 1) for a in (q, k, v)])[1] @ p["o"]


def _selective_scan(p: Any, x: Any) -> Any:
    """As in Mamba: step sizes and projections depend on the input, the decay is learnt, -exp(a)."""
    delta, b, c = jax.nn.softplus(x @ p["delta"]), x @ p["b"], x @ p["c"]
    decay = jnp.exp(-delta[..., None] * jnp.exp(p["a"]))
    drive = (delta * x)[..., None] * b[:, :, None, :]

    def combine(left: Any, right: Any) -> Any:
        return left[0] * right[0], left[1] * right[0] + right[1]

    states = lax.associative_scan(combine, (decay, drive), axis=1)[1]
    return jnp.einsum("btds,bts->btd", states, c) + p["skip"] * x


def _state_space(p: Any, x: Any) -> Any:
    """A discretised linear system, as in S4, unrolled."""
    half = jnp.eye(p["a"].shape[0]) - p["a"] / 2
    a = jnp.linalg.solve(half, jnp.eye(half.shape[0]) + p["a"] / 2)

    def step(h: Any, x: Any) -> Any:
        h = h @ a + x @ p["b"]
        return h, h @ p["c"]

    return _over_time(step, jnp.zeros((x.shape[0], p["a"].shape[0])), x)


def _diagonal_state_space(p: Any, x: Any) -> Any:
    """As in S5: a learnt complex diagonal."""
    rate = jnp.exp(-jnp.exp(p["re"]) + 1j * p["im"])

    def step(h: Any, x: Any) -> Any:
        h = rate * h + (x @ p["b"]).astype(jnp.complex64)
        return h, h.real @ p["c"]

    return _over_time(step, jnp.zeros((x.shape[0], rate.shape[0]), jnp.complex64), x)


def _neural_ode(p: Any, x: Any) -> Any:
    """Runge-Kutta of fourth order over a fixed grid."""
    field = lambda x: jnp.tanh(x @ p["w"]) @ p["u"]  # noqa: E731

    def step(x: Any, _: Any) -> Any:
        k1 = field(x)
        k2 = field(x + 0.05 * k1)
        k3 = field(x + 0.05 * k2)
        return x + 0.1 / 6 * (k1 + 2 * k2 + 2 * k3 + field(x + 0.1 * k3)), None

    return lax.scan(step, x, length=4)[0]


QKVO = {"q": "n n", "k": "n n", "v": "n n", "o": "n n"}
MAMBA = {"delta": "n n", "b": "n 4", "c": "n 4", "a": Draw("n 4", times=0.3), "skip": "n"}
DIAGONAL = {"b": "n 8", "c": "8 n", "re": Draw("8", times=0.3), "im": Draw("8", times=0.3)}
USES = (
    use("RNN", RECURRENT, _rnn, SEQUENCE),
    use("RNN with a learnt initial state", {**RECURRENT, "h0": "n"}, _rnn_from_learnt, SEQUENCE),
    use(
        "RNN with a learnt initial state in the carry",
        {**RECURRENT, "h0": "n"},
        _rnn_from_learnt_vector,
        SEQUENCE,
    ),
    use(
        "RNN with a learnt initial state per row",
        {**RECURRENT, "h0": "b n"},
        _rnn_from_learnt_matrix,
        SEQUENCE,
        expected="dense",
    ),
    use("LSTM", {"w": "n 4n", "u": "n 4n", "b": "4n"}, _lstm, SEQUENCE),
    use("LSTM on inputs and state side by side", {"w": "2n 4n"}, _lstm_concatenated, SEQUENCE),
    use("GRU", {"w": "n 2n", "u": "n 2n", "v": "n n", "k": "n n"}, _gru, SEQUENCE),
    use("attention", QKVO, _attention, SEQUENCE),
    use("attention with grouped queries", {**QKVO, "k": "n n/2", "v": "n n/2"}, _grouped_attention, SEQUENCE),
    use("attention with fused qkv", {"qkv": "n 3n", "o": "n n"}, _fused_attention, SEQUENCE),
    use("attention with heads in the weights", {"qkv": "3 n 4 n/4", "o": "4 n/4 n"}, _headed_attention, SEQUENCE),
    use("attention by jax.nn", QKVO, _library_attention, SEQUENCE),
    use("rotary attention", QKVO, _rotary_attention, SEQUENCE),
    use(
        "attention with a learnt bias of positions",
        {"q": "n n", "k": "n n", "bias": "6 6"},
        _biased_attention,
        SEQUENCE,
        expected="dense",
    ),
    use("attention with a cache", QKVO, _cached_attention, SEQUENCE),
    use("linear attention", QKVO, _linear_attention, SEQUENCE),
    use("selective scan", MAMBA, _selective_scan, SEQUENCE, expected="dense"),
    use("state space, discretised", {"a": "8 8", "b": "n 8", "c": "8 n"}, _state_space, SEQUENCE, expected="built"),
    use("state space, complex diagonal", DIAGONAL, _diagonal_state_space, SEQUENCE),
    use("neural ODE by scan", {"w": "n n", "u": "n n"}, _neural_ode),
)
