"""Flipout noise: against the built noise, shared by all members and never batched, its addresses, its statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll
from eggroll import zo
from eggroll.lazy.planning import make_plan
from eggroll.noise import addresses
from eggroll.noise.draws import build_noise, draw_pair
from eggroll.noise.factored import FactoredLeaf
from eggroll.population.evaluate import evaluate
from eggroll.population.layout import PopulationLayout
from eggroll.update import estimator, pair_sums
from tests.eggroll.lazy.test_perturbed import arrays_of
from tests.eggroll.models import MODELS
from tests.eggroll.replicates import Z_LIMIT, gradients, through_dot, z_scores
from tests.tables import by_default
from tests.zo.tiny_blocks import BATCH, PIECES, init

PAIRS, M, N = 7, 5, 4
KEY = jax.random.key(7)
C = jax.random.normal(jax.random.key(2), (M, N))
W = {"w": 0.5 * jax.random.normal(jax.random.key(1), (M, N))}


def built(plan, generation, pair):
    """E of every leaf."""
    drawn = draw_pair(plan, KEY, generation, pair)
    return [
        build_noise(leaf, own) if isinstance(leaf, FactoredLeaf) else own for leaf, own in zip(plan.leaves, drawn, strict=True)
    ]


def weight_first():
    params = {"w": jax.random.normal(jax.random.key(1), (6, 5))}
    return lambda params, x: jnp.tensordot(params["w"], x, (0, 1)), params, jax.random.normal(jax.random.key(3), (3, 6))


def half_precision():
    function, params, batch = weight_first()
    short = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    return lambda p, x: function(p, x.astype(jnp.bfloat16)).astype(jnp.float32), short, batch


CASES = {name: MODELS[name] for name in ("linen_tied_language_model", "plain_views", "plain_experts", "ensemble_vmap")}
CASES |= {"weight first": weight_first, "bfloat16": half_precision}


@pytest.mark.parametrize("name", by_default(CASES, "plain_experts", "ensemble_vmap", "weight first", "bfloat16"))
def test_equals_the_built_members(name):
    function, params, batch = CASES[name]()
    options = dict(population_size=2 * PAIRS, sigma=0.3, optimizer=optax.sgd(1.0))
    es = eggroll.EvolutionStrategy(None, perturbation=eggroll.Flipout(), **options)
    state = es.init(params, key=KEY)
    plan = es.plan(state, batch, function=function)
    assert any(leaf.role == "flipout" for leaf in plan.leaves)

    @jax.jit
    def compare(state, batch):
        population = es.ask(state)
        outputs = population.apply(function, batch)
        oracle = jax.vmap(lambda i: function(population.member(i), batch))(jnp.arange(2 * PAIRS))
        size = jnp.abs(oracle).max()
        return jnp.abs(outputs - oracle).max() / size, jnp.abs(oracle - function(state.params, batch)).max() / size

    error, spread = compare(state, batch)
    assert error <= (0.05 if name == "bfloat16" else 1e-5)  # a built bfloat16 member is rounded
    assert spread > 1e-2  # control: the perturbation is no rounding error


def test_out_of_range_lookups_behave_as_the_model_alone():
    params = {"table": jnp.arange(12.0).reshape(6, 2)}
    es = eggroll.EvolutionStrategy(None, population_size=2, sigma=0.3, optimizer=optax.sgd(1.0), perturbation=eggroll.Flipout())
    population = es.ask(es.init(params, key=KEY))
    outputs = population.apply(lambda p, i: jnp.take(p["table"], i, axis=0, mode="fill", fill_value=3.0), jnp.array([5, 6]))
    assert (np.asarray(outputs[:, 1]) == 3).all() and np.abs(outputs[:, 0] - params["table"][5]).max() > 1e-3


def planned(spec=eggroll.Flipout(), function=lambda p, x: x @ p["w"] + p["bias"], **more):
    params = {"w": jnp.zeros((M, N)), "bias": jnp.zeros(N)} | more
    return make_plan(function, params, jnp.zeros((1, M)), perturbation=spec)


def test_roles_reasons_and_bytes():
    def function(params, x):
        patches = jax.lax.conv(jnp.ones((1, 3, 6, 6)), params["filter"], (1, 1), "SAME")
        return x @ params["w"] + params["bias"], patches, x @ params["odd"]

    rules = [("odd", eggroll.LowRank(2)), (".*", eggroll.Flipout("rademacher"))]
    plan = planned(rules, function, filter=jnp.zeros((2, 3, 2, 2)), odd=jnp.zeros((M, N)))
    leaves = {leaf.path: leaf for leaf in plan.leaves}
    roles = {path: leaf.role for path, leaf in leaves.items()}
    assert roles == {"bias": "dense", "filter": "dense", "odd": "low-rank", "w": "flipout"}
    assert "convolution with shared noise" in leaves["filter"].reason and "'add'" in leaves["bias"].reason
    assert leaves["w"].noise_bytes == 4 and "noise of all members: 80 bytes" in plan.table()


# --- shared, and never batched --------------------------------------------------------------------------------------------


def traced(spec, chunk):
    params, batch = {"w": jnp.zeros((M, N)), "v": jnp.zeros((N, 3))}, jnp.zeros((11, M))
    function = lambda p, x, *_: jnp.tanh(x @ p["w"]) @ p["v"]  # noqa: E731
    plan = make_plan(function, params, batch, perturbation=spec)
    options = dict(noise_key=KEY, noise_generation=jnp.int32(0), sigma=jnp.float32(0.1), evaluation_key=KEY)
    layout = PopulationLayout(PAIRS, chunk_pairs=chunk)
    return jax.make_jaxpr(lambda p, x: evaluate(function, plan, p, batch=x, layout=layout, **options))(params, batch).jaxpr


def batched_weights(jaxpr, pairs):
    """Arrays that hold a matrix for every pair."""
    return [s for s, _ in arrays_of(jaxpr) if pairs in s[:-2] and s[-2:] in {(M, N), (N, M), (N, 3), (3, N)}]


@pytest.mark.parametrize("chunk", [None, 3])
def test_no_member_has_a_matrix_and_the_shared_noise_is_drawn_once(chunk):
    pairs = chunk or PAIRS

    def drawn_in_loops(jaxpr):
        loops = [equation.params["jaxpr"].jaxpr for equation in jaxpr.eqns if equation.primitive.name == "scan"]
        return [primitive for loop in loops for _, primitive in arrays_of(loop) if primitive == "erf_inv"]

    flipout, dense = traced(eggroll.Flipout(), chunk), traced(eggroll.Dense(), chunk)
    assert batched_weights(flipout, pairs) == [] and batched_weights(dense, pairs)
    assert drawn_in_loops(flipout) == [] and (chunk is None or drawn_in_loops(dense))
    assert sum(primitive == "erf_inv" for _, primitive in arrays_of(flipout)) == 2  # one for a matrix


# --- addresses ----------------------------------------------------------------------------------------------------------------


def test_signs_are_those_of_low_rank_noise_and_the_shared_noise_has_a_key_of_its_own():
    plans = planned(), planned(eggroll.LowRank(1))
    drawn, low_rank = jax.jit(lambda: [draw_pair(plan, KEY, 3, 5)[1] for plan in plans])()
    np.testing.assert_array_equal(drawn.signs.words, low_rank.words)
    keys = addresses.leaf_keys(addresses.stream_key(KEY, 4), 3, ["w"])
    words = addresses.draw_words(addresses.address_keys(keys, 0, [()]), [M * N])[0]
    np.testing.assert_array_equal(
        drawn.shared, addresses.decode(words, M * N, distribution="normal", dtype=jnp.float32).reshape(M, N)
    )
    assert words[:3].tolist() == [4159805203, 2937418840, 3579535782]  # a change of these bits breaks every journal


def test_stacked_layers_have_noise_of_their_own_at_their_index():
    function = lambda p, x: jax.lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0]  # noqa: E731
    plan = make_plan(function, {"w": jnp.zeros((3, M, M))}, jnp.zeros((1, M)), perturbation=eggroll.Flipout())
    whole = jax.jit(lambda: built(plan, 1, 2)[0])()
    one = make_plan(lambda p, x: x @ p["w"], {"w": jnp.zeros((M, M))}, jnp.zeros((1, M)), perturbation=eggroll.Flipout())
    alone = jax.jit(lambda: build_noise(one.leaves[0], draw_pair(one, KEY, 1, 2, first_index=1)[0]))()
    np.testing.assert_array_equal(whole[1], alone)
    assert np.abs(whole[0] - whole[1]).max() > 0.1


# --- estimate -----------------------------------------------------------------------------------------------------------------


def test_the_gradient_is_the_sum_of_built_noises_in_chunks(monkeypatch):
    monkeypatch.setattr(pair_sums, "NOISE_BUDGET", 180)  # 5 pairs of w: chunks of 5, 5 and 3
    plan, d = planned(), jax.random.normal(jax.random.key(5), (13,))

    @jax.jit
    def both(d):
        noises = jax.vmap(lambda pair: built(plan, 3, pair))(jnp.arange(13))
        expected = [jnp.tensordot(d, own, 1) / (2 * 13 * 0.1) for own in noises]
        return estimator.gradient(plan, d, noise_key=KEY, noise_generation=3, sigma=0.1), expected

    found, expected = both(d)
    for one, other in zip(jax.tree.leaves(found), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


def test_members_are_uncorrelated_with_unit_variance_and_equal_in_size():
    plan = planned()
    noises = jax.jit(jax.vmap(lambda g: jnp.stack([built(plan, g, p)[1] for p in (0, 1)])))(jnp.arange(4096))
    first, second = noises[:, 0], noises[:, 1]
    np.testing.assert_array_equal(jnp.abs(first), jnp.abs(second))
    assert np.abs(z_scores(first * second, 0 * C)).max() < Z_LIMIT
    assert np.abs(z_scores(first**2, 1 + 0 * C)).max() < Z_LIMIT
    assert np.abs(z_scores(first[:, :-1, :-1] * first[:, 1:, 1:], 0)).max() < Z_LIMIT
    assert np.abs(z_scores(first * jnp.abs(second), 0 * C)).max() < Z_LIMIT
    assert np.abs(z_scores(first * first, 0 * C)).max() > 2 * Z_LIMIT  # control: shared signs are seen


def samples(spec, *, num_pairs, replicates):
    objective = through_dot(lambda w: jnp.sum(w * C))
    return np.asarray(gradients(objective, W, perturbation=spec, sigma=0.5, num_pairs=num_pairs, replicates=replicates)["w"])


@pytest.mark.parametrize("distribution", addresses.DISTRIBUTIONS)
def test_a_linear_objective_is_exactly_unbiased_and_the_variance_follows_its_law(distribution):
    """Var g_ij = v C_ij^2 + (|C|^2 - C_ij^2) / P with v = Var(U_ij^2): 2 for normal U, at any number of pairs; 0 for signs."""
    pairs, replicates = 8, 8192
    drawn = samples(eggroll.Flipout(distribution), num_pairs=pairs, replicates=replicates)
    assert np.abs(z_scores(drawn, C)).max() < Z_LIMIT
    assert np.abs(z_scores(0.5 * drawn, C)).max() > 2 * Z_LIMIT and np.abs(z_scores(-drawn, C)).max() > 2 * Z_LIMIT
    floor = {"normal": 2.0, "rademacher": 0.0}[distribution]
    law = np.asarray(floor * C**2 + (jnp.sum(C**2) - C**2) / pairs)
    # the standard error of a sample variance is variance sqrt((kurtosis - 1) / R); that of a squared normal is 15
    tolerance = Z_LIMIT * (14 / replicates) ** 0.5
    assert np.abs(drawn.var(axis=0) / law - 1).max() < tolerance
    other = np.asarray((2 - floor) * C**2 + (jnp.sum(C**2) - C**2) / pairs)
    assert np.abs(drawn.var(axis=0) / other - 1).max() > tolerance


@pytest.mark.slow
def test_offloaded_blocks_have_the_same_noise():
    tuner = zo.mezo(PIECES, learning_rate=1e-2, sigma=1e-2, directions=3, chunk_directions=2, perturbation=eggroll.Flipout())
    away = zo.Offload(tuner)
    resident, offloaded = tuner.init(init(), key=KEY), away.init(init(), key=KEY)
    for _ in range(4):
        resident, metrics = tuner.step(resident, BATCH)
        offloaded, report = away.step(offloaded, BATCH)
        np.testing.assert_allclose(report.coefficients, metrics.coefficients, rtol=1e-3, atol=2e-6)
    found = away.parameters(away.flush(offloaded))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(resident.params), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(distribution="uniform"), "distribution must be one of normal, rademacher"),
        (dict(sigma_multiplier=0.0), "must be > 0"),
    ],
)
def test_wrong_settings_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        planned(eggroll.Flipout(**options))
