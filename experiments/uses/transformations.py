"""Transformations inside the fitness, and shapes at the edge."""

from typing import Any

import jax
import jax.numpy as jnp

from eggroll.experiments.uses.use import Draw, use

W = {"w": "n n"}
MLP = {"a": "n 2n", "b": "2n", "c": "2n n"}


def _mlp(p: Any, x: Any) -> Any:
    return jnp.tanh(x @ p["a"] + p["b"]) @ p["c"]


def _energy(p: Any, x: Any) -> Any:
    return jnp.sum(_mlp(p, x) ** 2)


def _inner_step(p: Any, x: Any) -> Any:
    """One step of gradient descent on the parameters, then the loss there."""
    moved = jax.tree.map(lambda leaf, slope: leaf - 0.01 * slope, p, jax.grad(_energy)(p, x))
    return _mlp(moved, x)


def _adapted_inputs(p: Any, x: Any) -> Any:
    """Gradient steps on a latent, with the weights in the loop."""
    return jax.lax.fori_loop(0, 3, lambda _, z: z - 0.01 * jax.grad(_energy, 1)(p, z), x)


def _hessian_vector(p: Any, x: Any) -> Any:
    return jax.jvp(lambda x: jax.grad(_energy, 1)(p, x), (x,), (jnp.ones_like(x),))[1]


@jax.custom_jvp
def _clipped(x: Any, w: Any) -> Any:
    return jnp.clip(x @ w, -1.0, 1.0)


_clipped.defjvp(lambda primals, tangents: (_clipped(*primals), tangents[0] @ primals[1] + primals[0] @ tangents[1]))


@jax.custom_vjp
def _straight(x: Any, w: Any) -> Any:
    return jnp.round(4 * (x @ w)) / 4 + x @ w


_straight.defvjp(lambda x, w: (_straight(x, w), (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))


def _linear_map(p: Any, x: Any) -> Any:
    value, tangent = jax.linearize(lambda x: _mlp(p, x), x)
    return value + tangent(jnp.cos(x))


def _transposed(p: Any, x: Any) -> Any:
    return jax.linear_transpose(lambda x: x @ p["w"], x)(x)[0]


def _jacobian(p: Any, x: Any) -> Any:
    return jax.jacfwd(lambda x: jnp.tanh(x @ p["w"]))(x[0])


def _scan_of_grad(p: Any, x: Any) -> Any:
    """The gradient of a loop with respect to its inputs."""

    def loop(x: Any) -> Any:
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ p["w"]), None), x, length=3)[0].sum()

    return jax.grad(loop)(x)


USES = (
    use("gradient of an inner loss by inputs", MLP, lambda p, x: jax.grad(_energy, 1)(p, x)),
    use("gradient of an inner loss by parameters", MLP, lambda p, x: jax.grad(_energy)(p, x)["c"]),
    use("inner gradient step on parameters", MLP, _inner_step),
    use("inner gradient steps on a latent", MLP, _adapted_inputs),
    use("gradient through a scan by inputs", W, _scan_of_grad),
    use("value_and_grad by inputs", MLP, lambda p, x: jax.value_and_grad(_energy, 1)(p, x)),
    use("Hessian-vector product by inputs", MLP, _hessian_vector),
    use("jvp by inputs", MLP, lambda p, x: jax.jvp(lambda x: _mlp(p, x), (x,), (jnp.cos(x),))),
    use("jvp by weights", W, lambda p, x: jax.jvp(lambda w: jnp.tanh(x @ w), (p["w"],), (jnp.ones_like(p["w"]),))),
    use("vjp by inputs", W, lambda p, x: jax.vjp(lambda x: jnp.tanh(x @ p["w"]), x)[1](jnp.ones_like(x))[0]),
    use("jacfwd by inputs", W, _jacobian),
    use("linearize", MLP, _linear_map),
    use("linear_transpose", W, _transposed),
    use("custom_jvp", W, lambda p, x: _clipped(x, p["w"])),
    use("custom_vjp", W, lambda p, x: _straight(x, p["w"])),
    use("nested jit", MLP, lambda p, x: jax.jit(lambda p, x: jax.jit(_mlp)(p, x))(p, x)),
    use(
        "jit with donated and static arguments",
        W,
        lambda p, x: jax.jit(lambda k, w, x: x @ w * k, static_argnums=0)(2, p["w"], x),
    ),
    use("checkpoint", MLP, lambda p, x: jax.checkpoint(_mlp)(p, x)),
    use("vmap over examples", MLP, lambda p, x: jax.vmap(_mlp, (None, 0))(p, x)),
    use("vmap over examples in the last axis", MLP, lambda p, x: jax.vmap(_mlp, (None, 1), 1)(p, x.T)),
    use("vmap over parameters", {"a": "3 n 2n", "b": "3 2n", "c": "3 2n n"}, lambda p, x: jax.vmap(_mlp, (0, None))(p, x)),
    use("vmap over parameters in axis 1", {"w": "n 3 n"}, lambda p, x: jax.vmap(lambda w: x @ w, 1)(p["w"])),
    use("vmap twice", W, lambda p, x: jax.vmap(jax.vmap(lambda x: x @ p["w"]))(x[None])),
    use("scalar parameter", {"s": Draw("", near=1.0)}, lambda p, x: x * p["s"], expected="dense"),
    use("vector parameter", {"s": Draw("n", near=1.0)}, lambda p, x: x * p["s"], expected="dense"),
    use("matrix 1 x n", {"w": Draw("1 n", times=0.5)}, lambda p, x: x[:, :1] @ p["w"], expected="dense"),
    use("matrix n x 1", {"w": "n 1"}, lambda p, x: x @ p["w"], expected="dense"),
    use("matrix 1 x 1", {"w": Draw("1 1", near=1.0)}, lambda p, x: x[:, :1] @ p["w"], expected="dense"),
    use("very thin, n x 2", {"w": "n 2"}, lambda p, x: x @ p["w"]),
    use(
        "four axes of size one",
        {"w": Draw("1 n 1 n", times=0.2)},
        lambda p, x: jnp.einsum("bi,aicj->bj", x, p["w"]),
        expected="built",
    ),
    use("zero columns", {"w": "n 0", "u": "n n"}, lambda p, x: (x @ p["u"], x @ p["w"])),
    use("zero rows", {"w": Draw("0 n"), "u": "n n"}, lambda p, x: x @ p["u"] + x[:, :0] @ p["w"]),
    use("zero-size sum", {"w": Draw("0 n"), "u": "n n"}, lambda p, x: x @ p["u"] + p["w"].sum()),
    use(
        "empty stack of layers",
        {"w": "0 n n", "u": "n n"},
        lambda p, x: jax.lax.scan(lambda x, w: (x @ w, None), x @ p["u"], p["w"])[0],
    ),
    use("stack of one layer", {"w": "1 n n"}, lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]),
    use("empty batch", W, lambda p, x: (x[:0] @ p["w"], x @ p["w"])),
    use("parameters in a list", ["n n", "n n"], lambda p, x: jnp.tanh(x @ p[0]) @ p[1]),
    use("one parameter without a tree", "n n", lambda p, x: x @ p),
)
