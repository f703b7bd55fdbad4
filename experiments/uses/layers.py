"""Stacked layers: one parameter holds the weights of all layers, and a loop takes them one by one."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from eggroll.experiments.uses.use import use

W = {"w": "3 n n"}
BIASED = {"w": "3 n n", "b": "3 n"}


def _layer(x: Any, w: Any) -> tuple[Any, None]:
    return jnp.tanh(x @ w), None


def _dense_layer(x: Any, layer: Any) -> tuple[Any, None]:
    return jnp.tanh(x @ layer["w"] + layer["b"]), None


def _residual(x: Any, layer: Any) -> tuple[Any, None]:
    hidden = jax.nn.gelu(x @ layer["up"] + layer["b"])
    return x + hidden @ layer["down"], x.mean()


def _nested(p: Any, x: Any) -> Any:
    """Two stacked axes: stages of layers."""
    return lax.scan(lambda x, stage: lax.scan(_layer, x, stage), x, p["w"])[0]


def _while(p: Any, x: Any) -> Any:
    def body(state: Any) -> Any:
        i, x = state
        return i + 1, _layer(x, p["w"][i])[0]

    return lax.while_loop(lambda state: state[0] < 3, body, (0, x))[1]


def _time_over_layers(p: Any, x: Any) -> Any:
    """A stacked recurrent network: the scan over layers is inside the scan over time."""

    def step(states: Any, x: Any) -> Any:
        def layer(x: Any, own: Any) -> Any:
            w, u, h = own
            h = jnp.tanh(x @ w + h @ u)
            return h, h

        return lax.scan(layer, x, (p["w"], p["u"], states))[::-1]

    start = jnp.zeros((3, x.shape[1], x.shape[2]))
    return lax.scan(step, start, x)[1]


def _associative(p: Any, x: Any) -> Any:
    """A linear recurrence whose gates are functions of the input."""
    decay, drive = jax.nn.sigmoid(x @ p["a"]), x @ p["b"]
    return lax.associative_scan(lambda l, r: (l[0] * r[0], l[1] * r[0] + r[1]), (decay, drive))[1]


def _matrix_products(p: Any, x: Any) -> Any:
    return x @ lax.associative_scan(jnp.matmul, p["w"])[-1]


def _map(p: Any, x: Any) -> Any:
    return lax.map(lambda w: jnp.tanh(x @ w), p["w"])


def _odd_layers(p: Any, x: Any) -> Any:
    return lax.scan(_layer, x, p["w"][1:])[0]


def _reverse(p: Any, x: Any) -> Any:
    return lax.scan(_layer, x, p["w"], reverse=True)[0]


def _unrolled(p: Any, x: Any) -> Any:
    for w in p["w"]:
        x = _layer(x, w)[0]
    return x


def _dynamic(p: Any, x: Any) -> Any:
    return lax.fori_loop(0, 3, lambda i, x: _layer(x, lax.dynamic_index_in_dim(p["w"], i, keepdims=False))[0], x)


def _transposed_stack(p: Any, x: Any) -> Any:
    """Layers in the last axis, moved to the front."""
    return lax.scan(_layer, x, jnp.moveaxis(p["w"], -1, 0))[0]


USES = (
    use("scan over layers", W, lambda p, x: lax.scan(_layer, x, p["w"])[0]),
    use("scan over layers with biases", BIASED, lambda p, x: lax.scan(_dense_layer, x, p)[0]),
    use("scan over residual blocks", {"up": "3 n 2n", "down": "3 2n n", "b": "3 2n"}, lambda p, x: lax.scan(_residual, x, p)),
    use("scan over layers, unrolled twice", W, lambda p, x: lax.scan(_layer, x, p["w"], unroll=2)[0]),
    use("scan over layers in reverse", W, _reverse),
    use("scan over layers from the second on", W, _odd_layers),
    use("scan over layers of a transposed stack", {"w": "n n 3"}, _transposed_stack),
    use("python loop over layers", W, _unrolled),
    use("fori_loop with w[i]", W, lambda p, x: lax.fori_loop(0, 3, lambda i, x: _layer(x, p["w"][i])[0], x)),
    use("fori_loop with dynamic_index_in_dim", W, _dynamic),
    use("while_loop with w[i]", W, _while),
    use("nested scans over stages of layers", {"w": "2 3 n n"}, _nested),
    use("scan over time around a scan over layers", {"w": "3 n n", "u": "3 n n"}, _time_over_layers, "4 b n"),
    use("scan with remat inside", W, lambda p, x: lax.scan(jax.checkpoint(_layer), x, p["w"])[0]),
    use(
        "scan over two reshaped stages", {"w": "4 n n"}, lambda p, x: _nested({"w": p["w"].reshape(2, 2, *p["w"].shape[1:])}, x)
    ),
    use("associative_scan with learnt gates", {"a": "n n", "b": "n n"}, _associative),
    use("associative_scan of matrices", W, _matrix_products),
    use("lax.map over layers", W, _map),
    use("vmap over layers", W, lambda p, x: jax.vmap(_layer, (None, 0))(x, p["w"])[0]),
    use("vmap over layers and a sum", W, lambda p, x: jax.vmap(lambda w: x @ w)(p["w"]).sum(0)),
    use("scan that repeats one layer", {"w": "n n"}, lambda p, x: lax.scan(lambda x, _: _layer(x, p["w"]), x, length=4)[0]),
    use(
        "fori_loop that repeats one layer", {"w": "n n"}, lambda p, x: lax.fori_loop(0, 4, lambda _, x: _layer(x, p["w"])[0], x)
    ),
)
