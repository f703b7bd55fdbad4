"""Weights in the carry of loops, and control flow."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from eggroll.experiments.uses.use import use

W = {"w": "n n"}
PAIR = {"w": "n n", "u": "n n"}


def _step(x: Any, w: Any) -> Any:
    return jnp.tanh(x @ w)


def _carried(p: Any, x: Any) -> Any:
    """The weights stay in the carry unchanged."""
    return lax.scan(lambda c, _: ((_step(c[0], c[1]), c[1]), None), (x, p["w"]), length=3)[0][0]


def _carried_while(p: Any, x: Any) -> Any:
    body = lambda c: (c[0] + 1, _step(c[1], c[2]), c[2])  # noqa: E731
    return lax.while_loop(lambda c: c[0] < 3, body, (0, x, p["w"]))[1]


def _carried_fori(p: Any, x: Any) -> Any:
    return lax.fori_loop(0, 3, lambda _, c: (_step(c[0], c[1]), c[1]), (x, p["w"]))[0]


def _carried_tree(p: Any, x: Any) -> Any:
    """The whole parameter tree in the carry."""
    return lax.fori_loop(0, 3, lambda _, c: (c[0], _step(_step(c[1], c[0]["w"]), c[0]["u"])), (p, x))[1]


def _returned(p: Any, x: Any) -> Any:
    """The carried weights are used after the loop."""
    x, w = lax.scan(lambda c, _: ((_step(c[0], c[1]), c[1]), None), (x, p["w"]), length=3)[0]
    return x @ w.T


def _plain_to_lazy(p: Any, x: Any) -> Any:
    """An array at first, the weights from the second iteration on."""
    start = jnp.eye(x.shape[1])
    return lax.scan(lambda c, _: ((_step(c[0], c[1]), p["w"]), None), (x, start), length=3)[0][0]


def _lazy_to_plain(p: Any, x: Any) -> Any:
    """The weights at first, an array from the second iteration on."""
    return lax.scan(lambda c, _: ((_step(c[0], c[1]), jnp.eye(x.shape[1])), None), (x, p["w"]), length=3)[0][0]


def _swap(p: Any, x: Any) -> Any:
    def body(c: Any, _: Any) -> Any:
        x, w, u = c
        return (_step(x, w), u, w), None

    return lax.scan(body, (x, p["w"], p["u"]), length=3)[0][0]


def _view(p: Any, x: Any) -> Any:
    """The weights are transposed on every iteration."""
    return lax.fori_loop(0, 3, lambda _, c: (_step(c[0], c[1]), c[1].T), (x, p["w"]))[0]


def _replaced(p: Any, x: Any) -> Any:
    """Another parameter takes the place of the first."""
    return lax.fori_loop(0, 3, lambda _, c: (_step(c[0], c[1]), p["u"]), (x, p["w"]))[0]


def _changed(p: Any, x: Any) -> Any:
    """Fast weights: the carried matrix is updated."""
    return lax.fori_loop(0, 3, lambda _, c: (_step(c[0], c[1]), 0.9 * c[1]), (x, p["w"]))[0]


def _hebbian(p: Any, x: Any) -> Any:
    def body(c: Any, row: Any) -> Any:
        return 0.9 * c + 0.1 * jnp.outer(row, row), row @ c

    return lax.scan(body, p["w"], x)[1]


def _nested_carry(p: Any, x: Any) -> Any:
    inner = lambda _, c: (_step(c[0], c[1]), c[1])  # noqa: E731
    return lax.fori_loop(0, 2, lambda _, c: lax.fori_loop(0, 2, inner, c), (x, p["w"]))[0]


def _stacked_output(p: Any, x: Any) -> Any:
    """The weights leave the loop as its stacked result."""
    weights = lax.scan(lambda c, _: (c, p["w"]), 0, length=2)[1]
    return x @ weights[1]


def _carried_stack(p: Any, x: Any) -> Any:
    return lax.fori_loop(0, 3, lambda i, c: (_step(c[0], c[1][i]), c[1]), (x, p["w"]))[0]


def _carried_embedding(p: Any, x: Any) -> Any:
    def body(i: Any, c: Any) -> Any:
        x, w = c
        return x + w[i], w

    return lax.fori_loop(0, 3, body, (x, p["w"]))[0]


def _condition(p: Any, x: Any) -> Any:
    """The condition of a loop reads the weights."""
    body = lambda c: (c[0] + 1, _step(c[1], p["w"]))  # noqa: E731
    return lax.while_loop(lambda c: (c[0] < 3) & ((c[1] @ p["u"]).sum() < 1e6), body, (0, x))[1]


def _data_dependent(p: Any, x: Any) -> Any:
    """Members leave the loop after different numbers of iterations."""
    body = lambda c: (c[0] + 1, 1.5 * _step(c[1], p["w"]) + 0.1)  # noqa: E731
    return lax.while_loop(lambda c: (c[0] < 20) & (jnp.abs(c[1]).max() > 0.9), body, (0, x))


def _cond(p: Any, x: Any) -> Any:
    return lax.cond(x.sum() > 0, lambda x: x @ p["w"], lambda x: jnp.sin(x @ p["u"]), x)


def _member_cond(p: Any, x: Any) -> Any:
    """Members take different branches."""
    return lax.cond((x @ p["w"]).sum() > 0, lambda x: x @ p["w"], lambda x: jnp.sin(x @ p["u"]), x)


def _one_sided(p: Any, x: Any) -> Any:
    return lax.cond(x.sum() < 1e6, lambda x: x @ p["w"], lambda x: x, x)


def _different_views(p: Any, x: Any) -> Any:
    return lax.cond(x.sum() < 1e6, lambda x: x @ p["w"], lambda x: x @ p["w"].T, x)


def _lookup_or_product(p: Any, x: Any) -> Any:
    return lax.cond(x.sum() < 1e6, lambda x: x @ p["w"], lambda x: x * p["w"][0], x)


def _chosen_weights(p: Any, x: Any) -> Any:
    """A branch returns weights."""
    return x @ lax.cond(x.sum() < 1e6, lambda: p["w"], lambda: p["u"])


def _switch(p: Any, x: Any) -> Any:
    branches = [lambda x: x @ p["w"], lambda x: jnp.sin(x @ p["w"]), lambda x: x]
    return lax.switch(jnp.argmax(x[0]) % 3, branches, x)


def _switch_over_layers(p: Any, x: Any) -> Any:
    branches = [lambda x, w: _step(x, w), lambda x, w: x + _step(x, w)]
    return lax.scan(lambda x, own: (lax.switch(own[0], branches, x, own[1]), None), x, (jnp.array([0, 1, 0]), p["w"]))[0]


def _nested_cond(p: Any, x: Any) -> Any:
    inner = lambda x: lax.cond(x[0, 0] > 0, lambda x: x @ p["w"], lambda x: -(x @ p["w"]), x)  # noqa: E731
    return lax.cond(x.sum() < 1e6, inner, lambda x: x, x)


USES = (
    use("carry: weights unchanged, scan", W, _carried),
    use("carry: weights unchanged, while_loop", W, _carried_while),
    use("carry: weights unchanged, fori_loop", W, _carried_fori),
    use("carry: the whole parameter tree", PAIR, _carried_tree),
    use("carry: used after the loop", W, _returned),
    use("carry: array, then weights", W, _plain_to_lazy, expected="built"),
    use(
        "carry: array, then weights, next to another product",
        PAIR,
        lambda p, x: _plain_to_lazy(p, x @ p["u"]),
        expected="built",
    ),
    use("carry: weights, then array", W, _lazy_to_plain),
    use("carry: two weights swapped", PAIR, _swap, expected="built"),
    use("carry: transposed on every iteration", W, _view),
    use("carry: replaced by another parameter", PAIR, _replaced, expected="built"),
    use("carry: decayed weights", W, _changed),
    use("carry: Hebbian update of initial weights", W, _hebbian),
    use("carry: nested loops", W, _nested_carry),
    use("carry: a stack indexed inside", {"w": "3 n n"}, _carried_stack),
    use("carry: an embedding looked up inside", {"w": "2n n"}, _carried_embedding),
    use("weights as stacked output of a scan", W, _stacked_output, expected="built"),
    use("weights in a while condition", PAIR, _condition),
    use("iterations that depend on the member", W, _data_dependent),
    use("cond on the inputs", PAIR, _cond),
    use("cond on the member", PAIR, _member_cond),
    use("cond with one branch without weights", W, _one_sided),
    use("cond with the transpose in a branch", W, _different_views),
    use("cond with a lookup in a branch", W, _lookup_or_product),
    use("cond that returns weights", PAIR, _chosen_weights, expected="built"),
    use("cond inside cond", W, _nested_cond),
    use("cond inside vmap over examples", PAIR, lambda p, x: jax.vmap(lambda x: _member_cond(p, x))(x), expected="built"),
    use("switch", W, _switch),
    use("switch over scanned layers", {"w": "3 n n"}, _switch_over_layers),
    use("select of two products", PAIR, lambda p, x: jnp.where(x > 0, x @ p["w"], x @ p["u"])),
    use("select of two weights", PAIR, lambda p, x: x @ jnp.where(x.sum() > 0, p["w"], p["u"]), expected="built"),
)
