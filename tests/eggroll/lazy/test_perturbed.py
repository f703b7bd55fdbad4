"""Unmodified models of every framework against the materialised member: equal, and with no weight built."""

import jax
import jax.extend.core as jexc
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll
from tests.eggroll.models import MODELS
from tests.tables import covering

PAIRS = 7  # a prime that is no axis of any model: its presence marks an array that is held per member
SPECS = {"rademacher-1": eggroll.LowRank(1), "normal-3": eggroll.LowRank(3, "normal")}


def strategy(spec, **options):
    options = dict(population_size=2 * PAIRS, sigma=0.3, optimizer=optax.sgd(1.0), perturbation=spec) | options
    return eggroll.EvolutionStrategy(None, **options)


def arrays_of(jaxpr):
    """Shapes of every intermediate array, inside control flow too."""
    for equation in jaxpr.eqns:
        yield from ((tuple(v.aval.shape), equation.primitive.name) for v in equation.outvars)
        for value in jax.tree.leaves(equation.params, is_leaf=lambda v: isinstance(v, jexc.ClosedJaxpr | jexc.Jaxpr)):
            if isinstance(value, jexc.ClosedJaxpr):
                yield from arrays_of(value.jaxpr)
            elif isinstance(value, jexc.Jaxpr):
                yield from arrays_of(value)


def materialised(es, state, function, batch):
    """Per-member arrays that end in the shape of a low-rank parameter or of one of its layers."""
    plan = es.plan(state, batch, function=function)
    low_rank = [leaf for leaf in plan.leaves if leaf.role == "low-rank"]
    shapes = {leaf.shape for leaf in low_rank} | {leaf.sizes((*leaf.rows, *leaf.columns)) for leaf in low_rank}
    shapes |= {shape[::-1] for shape in shapes}
    jaxpr = jax.make_jaxpr(lambda state, batch: es.ask(state).apply(function, batch))(state, batch).jaxpr
    return [
        (shape, primitive)
        for shape, primitive in arrays_of(jaxpr)
        for weight in shapes
        if PAIRS in shape[: len(shape) - len(weight)] and shape[len(shape) - len(weight) :] == weight
    ]


@pytest.mark.parametrize(("name", "spec"), covering(MODELS, SPECS, strength=1))
def test_equals_the_dense_oracle(name, spec):
    function, params, batch = MODELS[name]()
    es = strategy(SPECS[spec])
    state = es.init(params, key=jax.random.key(0))
    es.plan(state, batch, function=function)

    @jax.jit
    def compare(state, batch):
        population = es.ask(state)
        outputs = population.apply(function, batch)
        oracle = jax.vmap(lambda i: function(population.member(i), batch))(jnp.arange(2 * PAIRS))
        size = jnp.abs(oracle).max()
        return jnp.abs(outputs - oracle).max() / size, jnp.abs(oracle - function(state.params, batch)).max() / size

    error, spread = compare(state, batch)
    assert error <= 1e-5
    assert spread > 1e-2  # control: the perturbation is no rounding error


@pytest.mark.parametrize("name", [name for name in MODELS if name != "linen_optimized_lstm"])
def test_no_weight_is_materialised(name):
    function, params, batch = MODELS[name]()
    es = strategy(eggroll.LowRank(13))  # a rank that is no axis of any model
    state = es.init(params, key=jax.random.key(0))
    plan = es.plan(state, batch, function=function)
    assert any(leaf.role == "low-rank" for leaf in plan.leaves)
    for leaf, value in zip(plan.leaves, jax.tree.leaves(params), strict=True):
        is_matrix = leaf.path.rsplit("/", 2)[-1 if not leaf.path.endswith("value") else -2] in (
            "kernel",
            "weight",
            "embedding",
            "w",
        )
        assert leaf.role == "low-rank" or not is_matrix or value.ndim < 2, plan.table()
    assert materialised(es, state, function, batch) == []


def test_the_search_for_materialised_weights_finds_one():
    params = {"w": jnp.ones((6, 5))}
    es = strategy(eggroll.LowRank(1))
    state = es.init(params, key=jax.random.key(0))
    es.plan(state, jnp.ones((3, 6)), function=lambda p, x: x @ p["w"])

    def dense(state, batch):
        members = jax.vmap(es.ask(state).member)(jnp.arange(PAIRS))
        return jax.vmap(lambda p: batch @ p["w"])(members)

    jaxpr = jax.make_jaxpr(dense)(state, jnp.ones((3, 6))).jaxpr
    assert any(shape == (PAIRS, 6, 5) for shape, _ in arrays_of(jaxpr))


def test_equals_the_oracle_inside_scan_and_jit():
    function, params, batch = MODELS["linen_tied_language_model"]()
    es = strategy(eggroll.LowRank(2))
    state = es.init(params, key=jax.random.key(0))
    es.plan(state, batch, function=function)

    @jax.jit
    def three_generations(state, batch):
        def body(state, _):
            population = es.ask(state)
            outputs = population.apply(function, batch)
            oracle = jax.vmap(lambda i: function(population.member(i), batch))(jnp.arange(2 * PAIRS))
            return state._replace(generation=state.generation + 1), (outputs, oracle)

        return jax.lax.scan(body, state, None, length=3)[1]

    outputs, oracle = three_generations(state, batch)
    assert jnp.abs(outputs - oracle).max() <= 1e-5 * jnp.abs(oracle).max()
    assert jnp.abs(outputs[0] - outputs[1]).max() > 1e-2 * jnp.abs(oracle).max()


def test_bfloat16_parameters():
    function, params, batch = MODELS["linen_mlp"]()
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    es = strategy(eggroll.LowRank(1))
    state = es.init(params, key=jax.random.key(0))
    population = es.ask(state)
    outputs = population.apply(lambda p, x: function(p, x.astype(jnp.bfloat16)), batch).astype(jnp.float32)

    def exact(index):
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), population.member(index))
        return function(wide, batch)

    oracle = jax.jit(jax.vmap(exact))(jnp.arange(2 * PAIRS))
    assert jnp.abs(outputs - oracle).max() <= 0.05 * jnp.abs(oracle).max()  # bfloat16 has 8 bits: a few roundings of 2^-8


def test_a_later_function_may_build_what_the_first_multiplies():
    es, x = strategy(eggroll.LowRank(1)), jnp.ones((2, 4))
    state = es.init({"w": jnp.ones((4, 4))}, key=jax.random.key(0))
    es.plan(state, x, function=lambda p, x: x @ p["w"])
    population = es.ask(state)
    outputs = population.apply(lambda p, x: x @ jnp.sin(p["w"]), x)
    np.testing.assert_allclose(outputs[3], x @ jnp.sin(population.member(3)["w"]), rtol=1e-5)


def test_a_parameter_that_is_returned_is_built():
    es = strategy(eggroll.LowRank(1))
    state = es.init({"w": jnp.ones((4, 4))}, key=jax.random.key(0))
    plan = es.plan(state, jnp.ones((2, 4)), function=lambda p, x: (x @ p["w"], p["w"]))
    assert plan.leaves[0].role == "low-rank" and "returned" in plan.leaves[0].built[0]


def test_out_of_range_lookup_behaves_as_the_model_alone():
    params = {"table": jnp.arange(12.0).reshape(6, 2)}
    es = strategy(eggroll.LowRank(1))
    state = es.init(params, key=jax.random.key(0))
    outputs = es.ask(state).apply(lambda p, i: jnp.take(p["table"], i, axis=0), jnp.array([5, 6]))
    assert np.isfinite(outputs[:, 0]).all() and np.isnan(outputs[:, 1]).all()


def relative_difference(function, params, batch):
    es = strategy(eggroll.LowRank(2, "normal"), population_size=4)
    state = es.init(params, key=jax.random.key(0))
    es.plan(state, batch, function=function)

    @jax.jit
    def both(state, batch):
        population = es.ask(state)
        return population.apply(function, batch), jax.vmap(lambda i: function(population.member(i), batch))(jnp.arange(4))

    outputs, oracle = both(state, batch)
    return jnp.abs(outputs - oracle).max() / jnp.abs(oracle).max()


def weights(*shape, seed=2):
    return jax.random.normal(jax.random.key(seed), shape)


TWO = {"a": weights(4, 4), "b": weights(4, 4, seed=3)}
X = weights(5, 4, seed=4)
EDGE_CASES = {
    "cond returns a weight": (lambda p, x: x @ jax.lax.cond(x.sum() > -1e5, lambda: p["a"], lambda: p["a"].T), TWO, X),
    "cond chooses a weight": (lambda p, x: x @ jax.lax.cond(x.sum() > 0, lambda: p["a"], lambda: p["b"]), TWO, X),
    "switch over weights": (lambda p, i: X @ jax.lax.switch(i, [lambda: p["a"], lambda: p["b"]]), TWO, jnp.int32(1)),
    "zero for padding ids": (
        lambda p, i: jnp.take(p["e"], i, axis=0, mode="fill", fill_value=0.0),
        {"e": weights(6, 4)},
        jnp.array([1, 6]),
    ),
    "experts with padding": (
        lambda p, i: jnp.einsum("td,tdn->tn", X[:3], jnp.take(p["e"], i, axis=0, mode="fill", fill_value=0.0)),
        {"e": weights(3, 4, 4)},
        jnp.array([0, 5, 2]),
    ),
    "top-k experts of one token": (
        lambda p, i: jnp.einsum("d,kdf->kf", X[0], p["e"][i]),
        {"e": weights(5, 4, 3)},
        jnp.array([1, 4]),
    ),
    "scan over parts of the rows": (
        lambda p, x: jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"].reshape(3, 4, 4))[0],
        {"w": weights(12, 4)},
        X,
    ),
    "scan over an inserted axis": (lambda p, x: jax.lax.scan(lambda c, w: (c @ w, None), x, p["a"][None])[0], TWO, X),
    "product over an inserted axis": (lambda p, x: jnp.tensordot(x[:, None], p["a"][None], 2), TWO, X),
    "scaled weight": (lambda p, x: x @ (0.5 * p["a"]) @ (p["b"] / 3.0), TWO, X),
    "stopped gradient": (lambda p, x: x @ jax.lax.stop_gradient(p["a"]), TWO, X),
    "fused projections": (lambda p, x: sum(x @ w for w in jnp.split(p["w"], 2, axis=1)), {"w": weights(4, 6)}, X),
    "normalised weight": (lambda p, x: x @ (p["a"] / jnp.linalg.norm(p["a"])), TWO, X),
    "scan with another stacked axis": (
        lambda p, x: jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, jnp.moveaxis(p["w"], 1, 0))[0],
        {"w": weights(4, 3, 4)},
        X,
    ),
    "conditional without parameters": (lambda p, x: jax.lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x) @ p["a"], TWO, X),
}


@pytest.mark.parametrize("name", EDGE_CASES)
def test_edge_cases_equal_the_oracle(name):
    assert relative_difference(*EDGE_CASES[name]) <= 1e-5


@pytest.mark.parametrize("name", ["scaled weight", "stopped gradient", "fused projections", "top-k experts of one token"])
def test_views_keep_low_rank_noise(name):
    function, params, batch = EDGE_CASES[name]
    es = strategy(eggroll.LowRank(1))
    plan = es.plan(es.init(params, key=jax.random.key(0)), batch, function=function)
    used = [leaf for leaf in plan.leaves if leaf.role != "frozen"]
    assert used and all(leaf.role == "low-rank" for leaf in used), plan.table()
