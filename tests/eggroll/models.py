"""Models of every framework that the engine must evolve unmodified: name -> (function(params, batch), params, batch)."""

import functools

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import random


def _linen(module, batch):
    variables = module.init(random.key(0), batch)
    return lambda params, x: module.apply(params, x), _spread(variables), batch


def _spread(params):
    """Give zero-initialised leaves (biases) values of their own."""
    return jax.tree.map(lambda leaf: leaf + 0.1 * np.cos(np.arange(leaf.size, dtype=np.float32)).reshape(leaf.shape), params)


def _inputs(*shape):
    return random.normal(random.key(3), shape)


def linen_mlp():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4)(nn.relu(nn.Dense(16)(x)))

    return _linen(Net(), _inputs(3, 6))


def linen_dense_general():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.DenseGeneral((5,), axis=(-2, -1))(nn.tanh(nn.DenseGeneral((4, 3))(x)))

    return _linen(Net(), _inputs(2, 6))


def linen_attention():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)(nn.LayerNorm()(x))

    return _linen(Net(), _inputs(2, 5, 8))


def linen_tied_language_model():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.RMSNorm()(x))
            return x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.RMSNorm()(x)))), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(11, 8)
            blocks = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            x, _ = blocks()(embed(tokens), None)
            return embed.attend(x)

    return _linen(Net(), random.randint(random.key(3), (2, 5), 0, 11))


def linen_convolution():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(6, (3, 3), strides=(2, 2))(x))
            return nn.Dense(3)(nn.ConvTranspose(4, (2, 2))(x).reshape(x.shape[0], -1))

    return _linen(Net(), _inputs(2, 6, 6, 3))


def linen_lstm():
    return _linen(nn.RNN(nn.LSTMCell(6)), _inputs(2, 4, 5))


def linen_gru():
    return _linen(nn.RNN(nn.GRUCell(6)), _inputs(2, 4, 5))


def linen_optimized_lstm():
    """Its cell concatenates kernels, which has no rule: those get dense noise."""
    return _linen(nn.RNN(nn.OptimizedLSTMCell(6)), _inputs(2, 4, 5))


def _nnx(model, batch):
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    return lambda params, x: nnx.merge(graph, params, rest)(x), _spread(params), batch


def nnx_attention():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(11, 8, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 8, 8, decode=False, rngs=rngs)
            self.norm = nnx.RMSNorm(8, rngs=rngs)
            self.head = nnx.Linear(8, 11, rngs=rngs)

        def __call__(self, tokens):
            x = self.embed(tokens)
            return self.head(self.norm(x + self.attention(x)))

    return _nnx(Net(nnx.Rngs(0)), random.randint(random.key(3), (2, 5), 0, 11))


def nnx_convolution():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 5, (3, 3), rngs=rngs)
            self.linear = nnx.Linear(5, 4, rngs=rngs)

        def __call__(self, x):
            return self.linear(nnx.relu(self.conv(x)).mean(axis=(1, 2)))

    return _nnx(Net(nnx.Rngs(0)), _inputs(2, 6, 6, 3))


def equinox_mlp():
    model = eqx.nn.MLP(6, 3, 12, 2, key=random.key(0))
    params, static = eqx.partition(model, eqx.is_array)
    return lambda params, x: jax.vmap(eqx.combine(params, static))(x), params, _inputs(4, 6)


def haiku_mlp():
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([12, 3])(x)))
    batch = _inputs(4, 6)
    return net.apply, _spread(net.init(random.key(0), batch)), batch


def plain_einsum():
    params = {"q": _inputs(6, 2, 4), "o": _inputs(2, 4, 5), "w": _inputs(5, 3)}

    def apply(params, x):
        h = jax.nn.silu(jnp.einsum("bd,dhk->bhk", x, params["q"]))
        return jnp.einsum("bhk,hkn->bn", h, params["o"]) @ params["w"]

    return apply, params, _inputs(9, 6)


def plain_views():
    params = {"a": _inputs(6, 8), "b": _inputs(5, 8), "c": _inputs(10, 4), "stack": _inputs(3, 4, 4), "wide": _inputs(4, 2, 3)}

    def apply(params, x):
        h = jnp.einsum("bd,dhk->bhk", x, params["a"].reshape(6, 2, 4)).reshape(-1, 8)
        h = h @ params["b"].T
        h = h @ params["c"][2:7].astype(jnp.float32)
        for i in range(3):
            h = jnp.tanh(h @ params["stack"][i])
        return h @ params["wide"].reshape(4, 6)

    return apply, params, _inputs(9, 6)


def plain_control_flow():
    params = {"w": 0.3 * _inputs(6, 6), "u": 0.3 * _inputs(6, 6), "v": _inputs(6, 3)}

    @jax.custom_vjp
    def scaled(x):
        return 2.0 * x

    scaled.defvjp(lambda x: (scaled(x), None), lambda _, g: (g,))

    def apply(params, x):
        x = jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ params["w"])), (0, x))[1]
        x = jax.lax.cond(x.sum() > 0, lambda x: jax.nn.relu(x @ params["u"]), lambda x: x @ params["w"], x)
        x, _ = jax.lax.scan(lambda c, _: (scaled(jnp.sin(c @ params["u"])), None), x, None, length=2)
        return jax.jit(lambda w, x: x @ w)(params["v"], x)

    return apply, params, _inputs(9, 6)


def plain_used_twice():
    params = {"w": _inputs(6, 6), "out": _inputs(6, 5)}
    return lambda params, x: (x @ params["w"]) @ params["w"].T @ params["out"], params, _inputs(9, 6)


def plain_branches():
    """The branch depends on the member, inside a scan and outside; a branch that all share stays one."""
    params = {"w": 0.3 * _inputs(6, 6), "u": 0.3 * _inputs(6, 6)}

    def apply(params, x):
        def body(x, flag):
            x = jax.lax.cond(x.sum() > 0, lambda x: x @ params["w"], lambda x: jnp.sin(x @ params["u"]), x)
            return jax.lax.switch(flag, [lambda x: x @ params["u"], lambda x: x], x), None

        return jax.lax.scan(body, x, jnp.array([0, 1, 0]))[0]

    return apply, params, _inputs(9, 6)


def plain_experts():
    params = {"experts": _inputs(4, 6, 5), "router": _inputs(6, 8)}

    def apply(params, x):
        chosen = jnp.array([0, 2, 3])  # one expert per token
        return jnp.einsum("bd,bdn->bn", x, params["experts"][chosen]) * (x @ params["router"]).max()

    return apply, params, _inputs(3, 6)


def plain_indexed_layers():
    params = {"layers": _inputs(3, 6, 6)}

    def apply(params, x):
        def body(i, x):
            return jnp.tanh(x @ jax.lax.dynamic_index_in_dim(params["layers"], i, keepdims=False))

        return jax.lax.fori_loop(0, 3, body, x)

    return apply, params, _inputs(9, 6)


def ensemble_vmap():
    params = {"w": _inputs(4, 6, 3)}
    return lambda params, x: jax.vmap(lambda w: jnp.tanh(x @ w))(params["w"]), params, _inputs(3, 6)


MODELS = {
    function.__name__: functools.cache(function)
    for function in (
        linen_mlp,
        linen_dense_general,
        linen_attention,
        linen_tied_language_model,
        linen_convolution,
        linen_lstm,
        linen_gru,
        linen_optimized_lstm,
        nnx_attention,
        nnx_convolution,
        equinox_mlp,
        haiku_mlp,
        plain_einsum,
        plain_views,
        plain_control_flow,
        plain_used_twice,
        plain_branches,
        plain_experts,
        plain_indexed_layers,
        ensemble_vmap,
    )
}
