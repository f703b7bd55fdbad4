"""Models of other packages, imported and unmodified; a package that is missing makes its uses `skipped`."""

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from eggroll.experiments.uses.use import Draw, Program, Sizes, Use, draw, ids

KEY = 0


def _spread(params: Any) -> Any:
    """Values of their own for leaves that start at zero or one, such as biases."""
    return jax.tree.map(lambda leaf: leaf + 0.1 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape).astype(leaf.dtype), params)


def _model(name: str, package: str, build: Callable, batch: Any = "b n", expected: str = "low-rank") -> Use:
    """A use whose `build(package, sizes, batch)` returns the function and the parameters."""

    def make(sizes: Sizes) -> Program:
        inputs = draw(batch, sizes, weights=False)
        function, params = build(importlib.import_module(package), sizes, inputs)
        return Program(function, _spread(params), inputs)

    return Use(name, make, expected, package)


def _linen(name: str, build: Callable, batch: Any = "b n", **options: Any) -> Use:
    def initialised(nn: Any, sizes: Sizes, inputs: Any) -> Any:
        module = build(nn, sizes)
        return module.apply, module.init(jax.random.key(KEY), inputs)

    return _model(f"flax.linen {name}", "flax.linen", initialised, batch, **options)


def _nnx(name: str, build: Callable, batch: Any = "b n", call: Callable = lambda model, x: model(x), **options: Any) -> Use:
    def split(nnx: Any, sizes: Sizes, inputs: Any) -> Any:
        graph, params, rest = nnx.split(build(nnx, sizes, nnx.Rngs(KEY)), nnx.Param, ...)
        return lambda params, x: call(nnx.merge(graph, params, rest), x), params

    return _model(f"flax.nnx {name}", "flax.nnx", split, batch, **options)


def _haiku(name: str, build: Callable, batch: Any = "b n", **options: Any) -> Use:
    def transformed(hk: Any, sizes: Sizes, inputs: Any) -> Any:
        net = hk.without_apply_rng(hk.transform(lambda x: build(hk, sizes, x)))
        return net.apply, net.init(jax.random.key(KEY), inputs)

    return _model(f"haiku {name}", "haiku", transformed, batch, **options)


def _equinox(name: str, build: Callable, call: Callable, batch: Any = "b n", **options: Any) -> Use:
    def partitioned(eqx: Any, sizes: Sizes, inputs: Any) -> Any:
        params, static = eqx.partition(build(eqx.nn, sizes.width), eqx.is_inexact_array)
        return lambda params, x: jax.vmap(lambda x: call(eqx.combine(params, static), x))(x), params

    return _model(f"equinox {name}", "equinox", partitioned, batch, **options)


def _nnx_mlp(nnx: Any, sizes: Sizes, rngs: Any) -> Any:
    n = sizes.width
    return nnx.Sequential(
        nnx.Linear(n, 2 * n, rngs=rngs), nnx.gelu, nnx.LayerNorm(2 * n, rngs=rngs), nnx.Linear(2 * n, n, rngs=rngs)
    )


def _nnx_rnn(cell: Any, x: Any) -> Any:
    return jax.lax.scan(cell, jnp.zeros((x.shape[0], x.shape[2])), jnp.swapaxes(x, 0, 1))[1]


def _haiku_lstm(hk: Any, sizes: Sizes, x: Any) -> Any:
    core = hk.LSTM(sizes.width)
    return hk.dynamic_unroll(core, x, core.initial_state(x.shape[0]), time_major=False)[0]


def _haiku_attention(hk: Any, sizes: Sizes, x: Any) -> Any:
    initialiser = hk.initializers.VarianceScaling(1.0)
    return hk.MultiHeadAttention(4, sizes.width // 4, w_init=initialiser)(x, x, x)


def _equinox_rnn(cell: Any, x: Any) -> Any:
    return jax.lax.scan(lambda h, x: (cell(x, h), h), jnp.zeros(cell.hidden_size), x)[0]


def _equinox_lstm(cell: Any, x: Any) -> Any:
    start = jnp.zeros(cell.hidden_size)
    return jax.lax.scan(lambda h, x: (cell(x, h), h[0]), (start, start), x)[0]


def _policy(networks: Any, sizes: Sizes, inputs: Any) -> Any:
    """The policy of brax's PPO."""
    net = networks.make_ppo_networks(sizes.width, 4, policy_hidden_layer_sizes=(sizes.width,) * 2).policy_network
    return lambda params, x: net.apply(None, params, x), net.init(jax.random.key(KEY))


def _distribution(distrax: Any, sizes: Sizes, inputs: Any) -> Any:
    """Log probability of actions under a categorical policy."""
    params = {"w": Draw("n n", times=0.2).array("distrax", sizes)}

    def function(params: Any, x: Any) -> Any:
        policy = distrax.Categorical(logits=x @ params["w"])
        return policy.log_prob(jnp.arange(x.shape[0]) % x.shape[1]) + policy.entropy()

    return function, params


def _graph_network(jraph: Any, sizes: Sizes, inputs: Any) -> Any:
    params = {"edge": Draw("3n n", times=0.1).array("edge", sizes), "node": Draw("3n n", times=0.1).array("node", sizes)}

    def function(params: Any, batch: Any) -> Any:
        nodes, senders, receivers = batch
        count, edges = jnp.array([nodes.shape[0]]), jnp.array([senders.shape[0]])
        graph = jraph.GraphsTuple(nodes, nodes[senders], receivers, senders, None, count, edges)
        side_by_side = lambda w: lambda *parts: jnp.tanh(jnp.concatenate(parts[:3], -1) @ w)  # noqa: E731
        net = jraph.GraphNetwork(
            lambda e, s, r, g: side_by_side(params["edge"])(e, s, r), lambda n, s, r, g: side_by_side(params["node"])(n, s, r)
        )
        return net(graph).nodes

    return function, params


def _differential_equation(diffrax: Any, sizes: Sizes, inputs: Any) -> Any:
    params = {"w": Draw("n n", times=0.2).array("ode", sizes), "u": Draw("n n", times=0.2).array("out", sizes)}

    def function(params: Any, x: Any) -> Any:
        term = diffrax.ODETerm(lambda t, y, own: jnp.tanh(y @ own["w"]) @ own["u"])
        return diffrax.diffeqsolve(term, diffrax.Tsit5(), 0.0, 0.5, 0.1, x, args=params).ys

    return function, params


def _adaptive_equation(diffrax: Any, sizes: Sizes, inputs: Any) -> Any:
    function, params = _differential_equation(diffrax, sizes, inputs)

    def adaptive(params: Any, x: Any) -> Any:
        term = diffrax.ODETerm(lambda t, y, own: jnp.tanh(y @ own["w"]) @ own["u"])
        steps = diffrax.PIDController(rtol=1e-3, atol=1e-3)
        return diffrax.diffeqsolve(term, diffrax.Tsit5(), 0.0, 0.5, 0.1, x, args=params, stepsize_controller=steps).ys

    return adaptive, params


SEQUENCE = "b 6 n"
IMAGES = "b 8 8 n/4"
GRAPH = ["b n", ids("2b", "b"), ids("2b", "b")]
USES = (
    _linen("Dense", lambda nn, s: nn.Dense(s.width)),
    _linen("DenseGeneral", lambda nn, s: nn.DenseGeneral((4, s.width // 4))),
    _linen("Conv", lambda nn, s: nn.Conv(s.width, (3, 3)), IMAGES),
    _linen("ConvTranspose", lambda nn, s: nn.ConvTranspose(s.width, (2, 2), strides=(2, 2)), IMAGES),
    _linen(
        "Conv, depthwise",
        lambda nn, s: nn.Conv(s.width // 4, (3, 3), feature_group_count=s.width // 4),
        IMAGES,
    ),
    _linen("MultiHeadDotProductAttention", lambda nn, s: nn.MultiHeadDotProductAttention(4), SEQUENCE),
    _linen("LSTMCell", lambda nn, s: nn.RNN(nn.LSTMCell(s.width)), SEQUENCE),
    _linen("OptimizedLSTMCell", lambda nn, s: nn.RNN(nn.OptimizedLSTMCell(s.width)), SEQUENCE),
    _linen("GRUCell", lambda nn, s: nn.RNN(nn.GRUCell(s.width)), SEQUENCE),
    _linen("Embed", lambda nn, s: nn.Embed(2 * s.width, s.width), ids("b 6", "2n")),
    _linen("GroupNorm", lambda nn, s: nn.Sequential([nn.Dense(s.width), nn.GroupNorm(4), nn.Dense(s.width)])),
    _linen("WeightNorm", lambda nn, s: nn.WeightNorm(nn.Dense(s.width))),
    _nnx("MLP", _nnx_mlp),
    _nnx(
        "MultiHeadAttention",
        lambda nnx, s, rngs: nnx.MultiHeadAttention(4, s.width, s.width, decode=False, rngs=rngs),
        SEQUENCE,
    ),
    _nnx("GRUCell", lambda nnx, s, rngs: nnx.GRUCell(s.width, s.width, rngs=rngs), SEQUENCE, _nnx_rnn),
    _nnx("LoRALinear", lambda nnx, s, rngs: nnx.LoRALinear(s.width, s.width, lora_rank=4, rngs=rngs)),
    _haiku("MLP", lambda hk, s, x: hk.nets.MLP([2 * s.width, s.width])(x)),
    _haiku("LSTM", _haiku_lstm, SEQUENCE),
    _haiku("MultiHeadAttention", _haiku_attention, SEQUENCE),
    _haiku("Conv2D", lambda hk, s, x: hk.Conv2D(s.width, 3)(x), IMAGES),
    _haiku("DepthwiseConv2D", lambda hk, s, x: hk.DepthwiseConv2D(1, 3)(x), IMAGES),
    _equinox("MLP", lambda nn, n: nn.MLP(n, n, 2 * n, 2, key=jax.random.key(KEY)), lambda model, x: model(x)),
    _equinox("GRUCell", lambda nn, n: nn.GRUCell(n, n, key=jax.random.key(KEY)), _equinox_rnn, SEQUENCE),
    _equinox("LSTMCell", lambda nn, n: nn.LSTMCell(n, n, key=jax.random.key(KEY)), _equinox_lstm, SEQUENCE),
    _equinox(
        "MultiheadAttention",
        lambda nn, n: nn.MultiheadAttention(4, n, key=jax.random.key(KEY)),
        lambda model, x: model(x, x, x),
        SEQUENCE,
    ),
    _equinox("Conv1d", lambda nn, n: nn.Conv1d(n // 4, n, 3, key=jax.random.key(KEY)), lambda model, x: model(x), "b n/4 8"),
    _equinox(
        "Bilinear by Linear and Embedding",
        lambda nn, n: [nn.Linear(n, n, key=jax.random.key(KEY)), nn.Embedding(8, n, key=jax.random.key(1))],
        lambda model, x: model[0](x) * model[1](3),
    ),
    _model("brax PPO policy", "brax.training.agents.ppo.networks", _policy),
    _model("distrax Categorical", "distrax", _distribution),
    _model("jraph GraphNetwork", "jraph", _graph_network, GRAPH),
    _model("diffrax Tsit5, constant steps", "diffrax", _differential_equation),
    _model("diffrax Tsit5, adaptive steps", "diffrax", _adaptive_equation),
)
