"""Mixtures of experts by `ragged_dot`, whose groups differ between members, against the dense oracle."""

import jax
import jax.numpy as jnp
import pytest

import eggroll
from eggroll.lazy import ragged
from eggroll.lazy.planning import make_plan
from tests.eggroll.lazy.oracle import check, weights
from tests.eggroll.lazy.test_perturbed import arrays_of, strategy
from tests.tables import covering

PARAMS = {"experts": weights(3, 4, 4), "router": weights(4, 3, seed=3)}
X = weights(6, 4, seed=4)
SPECS = {
    "rademacher": eggroll.LowRank(1),
    "normal": eggroll.LowRank(3, "normal"),
    "flipout": eggroll.Flipout(),
    "dense": eggroll.Dense(),
    "frozen experts": [("experts", eggroll.Frozen()), (".*", eggroll.LowRank())],
    "dense experts": [("experts", eggroll.Dense()), (".*", eggroll.LowRank())],
}


def routed(params, x, experts=None):
    """Each row by the expert that the router chooses: groups of other sizes for every member."""
    chosen = jnp.argmax(x @ params["router"], axis=-1)
    order = jnp.argsort(chosen)
    sizes = jnp.bincount(chosen, length=3)
    out = jax.lax.ragged_dot(x[order], params["experts"] if experts is None else experts, sizes)
    return out[jnp.argsort(order)]


def known_sizes(*sizes):
    return lambda params, x: jax.lax.ragged_dot(x @ params["router"] @ params["router"].T, params["experts"], jnp.array(sizes))


def general(x, w, numbers):
    return jax.lax.ragged_dot_general(x, w, jnp.array([1, 3, 2]), jax.lax.RaggedDotDimensionNumbers(*numbers))


def other_axes(params, x):
    experts = jnp.transpose(params["experts"], (2, 0, 1))
    return general((x @ params["router"] @ params["router"].T).T, experts, ((((0,), (2,)), ((), ())), (1,), (1,)))


def ragged_contraction(params, x):
    """The runs are of the contracted axis: no form that has a rule."""
    rows = x @ params["router"]  # [6, 3]
    return general(x.T, rows, ((((1,), (0,)), ((), ())), (1,), ()))


USES = {
    "routed": routed,
    "used twice": lambda p, x: routed(p, jnp.tanh(routed(p, x)), jnp.swapaxes(p["experts"], 1, 2)),
    "groups are known": known_sizes(1, 3, 2),
    "an empty group": known_sizes(0, 4, 2),
    "rows after the last group": known_sizes(1, 3, 0),
    "more rows than there are": known_sizes(1, 3, 4),
    "other axes": other_axes,
    "contracts the ragged axis": ragged_contraction,
}


@pytest.mark.parametrize(("name", "spec"), covering(USES, SPECS, strength=1))
def test_ragged_products_equal_the_oracle(name, spec):
    check(USES[name], PARAMS, X, SPECS[spec], one_by_one=True)


@pytest.mark.parametrize("name", USES)
def test_experts_are_low_rank(name):
    (experts, router) = make_plan(USES[name], PARAMS, X, perturbation=eggroll.LowRank(1)).leaves
    if name == "contracts the ragged axis":
        assert (experts.role, router.role) == ("frozen", "low-rank")
    else:
        assert experts.role == "low-rank" and experts.reason.startswith("axis 1 x axis 2, stacked over axis 0")
        assert experts.stack == (0,)


def test_layers_of_experts():
    params = {"experts": weights(2, 3, 4, 4), "router": PARAMS["router"]}

    def apply(params, x):
        return jax.lax.scan(lambda x, experts: (jnp.tanh(routed(params, x, experts)), None), x, params["experts"])[0]

    plan = check(apply, params, X, one_by_one=True)
    assert plan["experts"].role == "low-rank" and plan["experts"].stack == (0, 1)


def members(params, x, sizes):
    """Pairs of two, the experts shared, the rows of a pair shared or not."""

    def one(x, sizes):
        about = {"precision": None, "preferred_element_type": None}
        return ragged.ragged_p.bind(x, params["experts"], sizes, **about)

    return jax.vmap(jax.vmap(one, in_axes=(0 if x.ndim == 4 else None, 0)))(x, sizes)


@pytest.mark.parametrize("shared", [False, True])
def test_rows_of_all_members_are_sorted_where_that_pays(monkeypatch, shared):
    x = jax.random.normal(jax.random.key(1), (5, 6, 4) if shared else (5, 2, 6, 4))
    sizes = jax.random.randint(jax.random.key(2), (5, 2, 3), 0, 4)  # rows are left over, or too few
    outputs = members(PARAMS, x, sizes)
    monkeypatch.setattr(ragged, "sorts_rows", lambda: True)
    jaxpr = jax.make_jaxpr(members)(PARAMS, x, sizes)
    assert [shape for shape, primitive in arrays_of(jaxpr.jaxpr) if primitive == "ragged_dot"] == [(60, 4)]  # one product
    for pair in range(5):
        for sign in range(2):
            own = jax.lax.ragged_dot(x[pair] if shared else x[pair, sign], PARAMS["experts"], sizes[pair, sign])
            for batched in (outputs, members(PARAMS, x, sizes)):
                assert jnp.allclose(batched[pair, sign], own, rtol=0, atol=1e-5)


def test_flipout_says_why_experts_are_dense():
    (experts, _) = make_plan(routed, PARAMS, X, perturbation=eggroll.Flipout()).leaves
    assert experts.role == "dense" and "a ragged product with shared noise" in experts.reason


def test_int8_experts_in_integers():
    params = {"experts": (20 * weights(3, 4, 4)).astype(jnp.int8)}
    x = (50 * X).astype(jnp.int8)

    def by_ragged_dot(params, x):
        return jax.lax.ragged_dot(x, params["experts"], jnp.array([1, 3, 2]), preferred_element_type=jnp.int32)

    def by_lookup(params, x):
        experts = params["experts"][jnp.array([0, 1, 1, 1, 2, 2])]
        return jnp.einsum("td,tdn->tn", x, experts, preferred_element_type=jnp.int32)

    es = strategy(eggroll.Integer(2), sigma=None, shaping="pair_sign", optimizer=eggroll.threshold(0.5))
    state = es.init(params, key=jax.random.key(0))
    outputs = [es.ask(state).apply(function, x) for function in (by_ragged_dot, by_lookup)]
    assert (outputs[0] == outputs[1]).all() and (outputs[0] != outputs[0][:1]).any()
