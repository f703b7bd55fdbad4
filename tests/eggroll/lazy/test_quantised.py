"""Int8 parameters under floating noise: lazily what the built member gives, updated on the integers, refused unconverted."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll
from eggroll import zo
from eggroll.update import estimator
from eggroll.update.precision import init_masters
from tests.eggroll.lazy.test_perturbed import arrays_of
from tests.eggroll.update.rounding import apply_updates
from tests.tables import by_default

PAIRS = 7  # a prime that is no axis of any parameter
SPECS = {
    "rademacher-1": eggroll.LowRank(1),
    "rademacher-4": eggroll.LowRank(4),
    "normal-1": eggroll.LowRank(1, "normal"),
    "normal-4": eggroll.LowRank(4, "normal"),
    "refreshed": eggroll.LowRank(2, "normal", refresh=3),
    "dense": eggroll.Dense(),
    "flipout": eggroll.Flipout(),
}


def ints(*shape, seed=0, size=127):
    return jnp.asarray(np.random.default_rng(seed).integers(-size, size + 1, shape), jnp.int8)


def floats(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


PARAMS = {
    "bias": ints(8, seed=1),
    "embed": ints(9, 6, seed=2),
    "head": ints(9, 6, seed=3),
    "layers": ints(4, 6, 6, seed=4),
    "norm": 1 + 0.1 * floats(6, seed=5),
    "product": ints(6, 8, seed=6),
    "scales": 0.01 * (1 + 0.1 * floats(4, 6, seed=7)),
    "view": ints(8, 2, 3, seed=8),
}
BATCH = floats(3, 6, seed=9), jnp.array([0, 8, 3, 3], jnp.int32)


def model(p, batch):
    """Every way to use a quantised parameter: its conversion before and after the lookup, in a scan, behind views."""
    x, index = batch

    def layer(x, own):
        w, scale = own
        return jnp.tanh((x @ w.astype(x.dtype)) * scale) * p["norm"].astype(x.dtype), None

    stacked, _ = jax.lax.scan(layer, x, (p["layers"], p["scales"].astype(x.dtype)))
    looked = p["embed"][index].astype(x.dtype)
    return {
        "product": x @ p["product"].astype(x.dtype) + p["bias"].astype(x.dtype),
        "stacked": stacked,
        "looked up": looked,
        "looked up after": jnp.take(p["head"].astype(x.dtype), index, axis=0),
        "head": jnp.einsum("td,vd->tv", looked, p["head"].astype(x.dtype)),
        "view": x @ p["view"].reshape(8, 6).T.astype(x.dtype),
        "each": jax.lax.map(lambda x: x @ p["product"].astype(x.dtype), x),
    }


def rules(spec):
    """Noise of small floats in their own size, and `spec` of all else, whose sigma is in integers."""
    return [("norm|scales", eggroll.Dense(sigma_multiplier=0.01)), (".*", spec)]


def strategy(fitness=None, **options):
    options = dict(population_size=2 * PAIRS, sigma=0.4, optimizer=optax.sgd(1.0)) | options
    return eggroll.EvolutionStrategy(fitness, **options)


def start(es, params=PARAMS):
    return es.init(params, key=jax.random.key(3))


def nearly(tree, reference, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(reference), strict=True):
        assert float(jnp.abs(a - b).max()) <= tolerance * float(jnp.abs(b).max())


def as_floats(params, dtype=jnp.float32):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


@pytest.mark.parametrize("name", by_default(SPECS, "rademacher-4"))
def test_a_member_is_float_of_q_plus_its_noise(name):
    """Against the built members, of both signs, and against the float model of the same values and addresses."""
    es, other = (strategy(perturbation=rules(SPECS[name])) for _ in range(2))
    state, floating = start(es), start(other, as_floats(PARAMS))
    es.plan(state, BATCH, function=model)
    other.plan(floating, BATCH, function=model)

    @jax.jit
    def members(state, floating):
        every = jnp.arange(2 * PAIRS)
        populations = es.ask(state), other.ask(floating)
        outputs = [population.apply(model, BATCH) for population in populations]
        built = [jax.vmap(population.member)(every) for population in populations]
        return outputs, built, jax.vmap(lambda p: model(p, BATCH))(built[0])

    (outputs, of_floats), (built, built_floats), oracle = members(state, floating)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(built))
    nearly(outputs, oracle)
    nearly(outputs, of_floats)
    nearly(built, built_floats)
    noise = built["layers"] - PARAMS["layers"].astype(jnp.float32)
    np.testing.assert_allclose(noise[::2], -noise[1::2], atol=1e-4)
    assert 0.2 < float(jnp.std(noise)) < 0.6  # sigma, in integers


@pytest.mark.parametrize("name", ["rademacher-1", "normal-4"])
def test_no_weight_is_built_for_a_member(name):
    es = strategy(perturbation=SPECS[name])
    state = start(es)
    plan = es.plan(state, BATCH, function=model)
    roles = {leaf.path: leaf.role for leaf in plan.leaves}
    low_rank = {name for name, role in roles.items() if role == "low-rank"}
    assert low_rank == {"embed", "head", "layers", "product", "view"} and roles["bias"] == "dense"
    jaxpr = jax.make_jaxpr(lambda state, batch: es.ask(state).apply(model, batch))(state, BATCH).jaxpr
    sides = {(6, 8), (8, 6), (9, 6), (6, 9), (6, 6), (8, 2, 3)}
    held = [shape for shape, _ in arrays_of(jaxpr) if PAIRS in shape and any(shape[-len(side) :] == side for side in sides)]
    assert not held
    dense = strategy(perturbation=eggroll.Dense())
    jaxpr = jax.make_jaxpr(lambda state, batch: dense.ask(state).apply(model, batch))(start(dense), BATCH).jaxpr
    assert any(PAIRS in shape and shape[-2:] == (9, 6) for shape, _ in arrays_of(jaxpr))  # control


@pytest.mark.parametrize("dtype", by_default([jnp.bfloat16, jnp.float16], jnp.bfloat16))
def test_noise_has_the_dtype_of_the_conversion(dtype):
    batch = BATCH[0].astype(dtype), BATCH[1]
    es, other = (strategy(perturbation=SPECS["normal-4"]) for _ in range(2))
    state, floating = start(es), start(other, as_floats(PARAMS, dtype))
    plan, expected = es.plan(state, batch, function=model), other.plan(floating, batch, function=model)
    assert {leaf.noise_dtype for leaf in plan.leaves if leaf.quantised} == {jnp.dtype(dtype)}
    assert [leaf.noise_bytes for leaf in plan.leaves if leaf.quantised] == [
        leaf.noise_bytes for leaf, mine in zip(expected.leaves, plan.leaves, strict=True) if mine.quantised
    ]
    outputs, reference = (s.ask(at).apply(model, batch) for s, at in ((es, state), (other, floating)))
    np.testing.assert_array_equal(*(np.asarray(o["product"], np.float32) for o in (outputs, reference)))


def test_the_table_says_which_parameters_are_quantised():
    es = strategy()
    table = es.plan(start(es), BATCH, function=model).table()
    rows = {line.split()[0]: line for line in table.splitlines()}
    assert all(("int8 quantised" in rows[name]) == (PARAMS[name].dtype == jnp.int8) for name in PARAMS)
    assert "low-rank" in rows["layers"] and "axis 1 x axis 2, stacked over axis 0" in rows["layers"]
    assert "dense" in rows["bias"]


def test_a_conditional_and_a_loop_use_quantised_parameters():
    def function(p, x):
        def turn(x):
            odd = jnp.sum(x) > 0
            return jax.lax.cond(odd, lambda x: x @ p["w"].astype(x.dtype), lambda x: x + p["b"].astype(x.dtype), x) / 500.0

        return jax.lax.fori_loop(0, 3, lambda _, x: turn(x), x)

    es = strategy()
    state = start(es, {"w": ints(6, 6), "b": ints(6, seed=1)})
    population = es.ask(state)
    outputs = population.apply(function, BATCH[0])
    nearly(outputs, jax.vmap(lambda i: function(population.member(i), BATCH[0]))(jnp.arange(2 * PAIRS)))


WRONG = {
    "a product of integers": lambda p, x: jax.lax.dot_general(
        jnp.ones((2, 6), jnp.int8), p["w"], (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32
    ),
    "a product with floats": lambda p, x: jax.lax.dot_general(
        x, p["w"], (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
    ),
    "a sum": lambda p, x: jnp.sum(p["w"]),
    "a multiple": lambda p, x: p["w"] * jnp.int8(2),
    "wider integers": lambda p, x: p["w"].astype(jnp.int32),
    "its result": lambda p, x: p["w"],
    "joined": lambda p, x: jnp.concatenate([p["w"], p["w"]]).astype(x.dtype),
    "rows": lambda p, x: p["w"][jnp.arange(2)] + jnp.int8(1),
    "a view": lambda p, x: p["w"].T,
    "split": lambda p, x: jnp.sum(p["w"].reshape(-1)),
}


@pytest.mark.parametrize("spec", [eggroll.LowRank(), eggroll.Dense()], ids=["low-rank", "dense"])
@pytest.mark.parametrize("name", WRONG)
def test_computing_with_the_integers_is_one_clear_error(name, spec):
    es = strategy(perturbation=spec)
    with pytest.raises(ValueError, match=r"int8 parameter 'w' has floating noise but is used in .* before it is a float"):
        es.plan(start(es, {"w": ints(6, 8)}), BATCH[0], function=WRONG[name])


def test_other_settings_are_refused():
    params = {"w": ints(6, 8), "x": ints(6, 8)}
    with pytest.raises(ValueError, match="mixes Integer"):
        strategy(perturbation=[("w", eggroll.Integer()), (".*", eggroll.LowRank())])
    with pytest.raises(ValueError, match="dtype int32, which no floating perturbation fits"):
        start(strategy(), {"w": jnp.ones((2, 2), jnp.int32)})
    tuner = zo.ZerothOrder(lambda p, b, k: jnp.sum(p["w"]), directions=2, sigma=0.1, optimizer=optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"int8 parameter 'w' evolves under eggroll.EvolutionStrategy only"):
        tuner.init(params, key=jax.random.key(0))


# The update.


def fitness(p, batch, key):
    return -jnp.mean((model(p, batch)["product"] / 100 - 1) ** 2) - jnp.mean(model(p, batch)["head"]) / 1e4


@pytest.mark.parametrize("name", by_default(SPECS, "normal-4"))
def test_the_gradient_is_that_of_a_float_parameter_bit_for_bit(name):
    coefficients, used = floats(PAIRS, seed=1), ("bias", "product", "view")

    def function(p, x):
        return x @ p["product"].astype(x.dtype) + p["bias"].astype(x.dtype), x @ p["view"].reshape(8, 6).T.astype(x.dtype)

    known = dict(noise_key=jax.random.key(1), noise_generation=2, sigma=0.4)
    gradients = []
    for params in (PARAMS, as_floats(PARAMS)):
        es = strategy(perturbation=SPECS[name])
        plan = es.plan(start(es, {own: params[own] for own in used}), BATCH[0], function=function)
        gradients.append(jax.jit(lambda d, plan=plan: estimator.gradient(plan, d, **known))(coefficients))
    for one, other in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_array_equal(one, other)


def test_rounding_keeps_the_mean_and_a_control_does_not():
    """Mean of n updates of 0.3, against the deviation sqrt(0.3 0.7 / n) of a Bernoulli variable."""
    count = 40_000
    params = {"w": jnp.concatenate([jnp.zeros(count // 2, jnp.int8), jnp.full(count // 2, -7, jnp.int8)])}

    def mean(precision):
        known = dict(precision=precision, key=jax.random.key(0), quantised=(True,))
        masters = init_masters(params, precision, quantised=(True,))
        after, _ = apply_updates(params, masters, {"w": jnp.full(count, 0.3)}, **known)
        moved = np.asarray(after["w"], np.float64) - np.asarray(params["w"], np.float64)
        assert after["w"].dtype == jnp.int8 and set(moved) <= {0.0, 1.0}
        return [part.mean() for part in np.split(moved, 2)]

    deviation = math.sqrt(0.3 * 0.7 / (count // 2))
    assert all(abs(part - 0.3) < 5 * deviation for part in mean("stochastic"))
    assert all(abs(part - 0.3) > 50 * deviation for part in mean("nearest"))


def test_masters_add_up_and_stay_in_range():
    params = {"w": jnp.array([0, 126, -126, 5], jnp.int8)}
    masters = init_masters(params, "master", quantised=(True,))
    seen = []
    for _ in range(4):
        known = dict(precision="master", key=jax.random.key(0), quantised=(True,))
        params, masters = apply_updates(params, masters, {"w": jnp.array([0.3, 0.6, -0.6, 0.0])}, **known)
        seen.append(params["w"].tolist())
    assert seen == [[0, 127, -127, 5], [1, 127, -127, 5], [1, 127, -127, 5], [1, 127, -127, 5]]
    assert masters[0].tolist() == [pytest.approx(1.2), 127.0, -127.0, 5.0]


@pytest.mark.parametrize("precision", by_default(["master", "stochastic", "nearest"], "stochastic"))
def test_floats_and_integers_evolve_together_and_are_replayed(precision):
    rules = [("layers", eggroll.Frozen()), (".*", eggroll.LowRank())]
    params = PARAMS | {"layers": PARAMS["layers"].at[0, 0, 0].set(-128)}
    options = dict(perturbation=rules, precision=precision, shaping="z_score", optimizer=optax.sgd(2.0, momentum=0.9))
    es = strategy(fitness, **options)
    before = start(es, params)
    assert [master is not None for master in before.masters] == [
        precision == "master" and leaf.dtype == jnp.int8 and name != "layers" for name, leaf in params.items()
    ]
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(before.opt_state))
    after, metrics = es.step(eggroll.copy_state(before), BATCH)
    assert all(after.params[name].dtype == leaf.dtype for name, leaf in params.items())
    np.testing.assert_array_equal(after.params["layers"], params["layers"])  # frozen, -128 too
    moved = {name: int((after.params[name] != leaf).sum()) for name, leaf in params.items()}
    size = sum(leaf.size for name, leaf in params.items() if name != "layers")
    assert moved["product"] > 0 and moved["bias"] > 0
    assert float(metrics.moved) == pytest.approx(sum(moved.values()) / size, rel=1e-6)
    for leaf, master in zip(jax.tree.leaves(after.params), after.masters, strict=True):
        if master is not None:
            np.testing.assert_array_equal(leaf, np.round(np.asarray(master)).astype(np.int8))
    replayed = es.replay(eggroll.copy_state(before), metrics.coefficients)
    told, _ = es.tell(before, metrics.fitness)
    for other in (replayed, told):
        for one, two in zip(*map(jax.tree.leaves, ((after.params, after.masters), (other.params, other.masters))), strict=True):
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    ("precision", "optimizer"),
    [
        ("stochastic", optax.adam(0.5)),
        ("master", optax.adam(0.5)),
        ("nearest", optax.chain(optax.scale_by_adam(), eggroll.standardised_sign(0.5), optax.scale(-1.0))),
    ],
    ids=["stochastic", "master", "standardised sign"],
)
def test_a_quantised_matrix_learns(precision, optimizer, standard_promotion):
    target = ints(6, 4, seed=1, size=20).astype(jnp.float32)

    def error(p):
        return jnp.mean((jnp.eye(6) @ p["w"].astype(jnp.float32) - target) ** 2)

    options = dict(population_size=64, sigma=0.4, precision=precision, optimizer=optimizer)
    es = strategy(lambda p, batch, key: -error(p), **options)
    state = start(es, {"w": jnp.zeros((6, 4), jnp.int8)})
    first = error(state.params)
    state, _ = jax.lax.scan(lambda state, _: es.step(state), state, None, length=150)
    assert error(state.params) < 0.1 * first


def test_standardised_sign_by_hand():
    updates = {
        "spread": jnp.array([[3.0, 1.0], [1.0, -1.0]]),  # mean 1, deviation sqrt(2): z = +-1.41421, 0
        "shifted": jnp.array([13.0, 11.0, 11.0, 9.0], jnp.bfloat16),
        "equal": jnp.full(5, 4.0),
        "scalar": jnp.float32(2.0),
    }

    def steps(threshold):
        found, state = eggroll.standardised_sign(threshold).update(updates, optax.EmptyState())
        assert state == optax.EmptyState() and found["shifted"].dtype == jnp.bfloat16
        return {name: leaf.astype(jnp.float32).reshape(-1).tolist() for name, leaf in found.items()}

    still = {"equal": [0.0] * 5, "scalar": [0.0]}
    for threshold in (0, 1.4142):
        assert steps(threshold) == {"spread": [1.0, 0.0, 0.0, -1.0], "shifted": [1.0, 0.0, 0.0, -1.0]} | still
    assert steps(1.4143) == {"spread": [0.0] * 4, "shifted": [0.0] * 4} | still


@pytest.mark.parametrize("threshold", [-1.0, math.inf, math.nan, "1"])
def test_a_wrong_threshold_is_refused(threshold):
    with pytest.raises(ValueError, match="threshold must be a finite number >= 0, got"):
        eggroll.standardised_sign(threshold)
