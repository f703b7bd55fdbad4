"""Values that float32 cannot tell apart, that overflow, that wrap: what the shapings and `tell` make of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll
from eggroll.generation import LAST_GENERATION
from eggroll.update.told import check_told
from tests.eggroll.update.test_shaping import SHAPED

X = jnp.ones((2, 3))
CLOSE = np.array([1e8, 1e8 + 1, 1e8 + 3, 1e8 + 2, 1e8 + 7, 1e8 + 4, 1e8 + 5, 1e8 + 6])
SMALL = CLOSE - 1e8


def strategy(**options):
    settings = dict(population_size=8, sigma=0.1, optimizer=optax.sgd(0.1), shaping="centered_ranks") | options
    es = eggroll.EvolutionStrategy(None, **settings)
    state = es.init({"w": jnp.ones((3, 2))}, key=jax.random.key(0))
    es.plan(state, X, function=lambda params, x: x @ params["w"])
    return es, state


def coefficients(fitness, **options):
    es, state = strategy(**options)
    return np.asarray(es.tell(state, fitness)[1].coefficients)


@pytest.mark.parametrize("shaping", ["centered_ranks", "pair_sign", "z_score"])
@pytest.mark.parametrize("given", [CLOSE, CLOSE.astype(np.int64), CLOSE.tolist(), np.stack([CLOSE, CLOSE + 1e9], axis=1)])
def test_values_that_float32_cannot_tell_apart_are_told_apart(shaping, given):
    expected = coefficients(SMALL.astype(np.float32), shaping=shaping)
    assert (expected != 0).all()
    np.testing.assert_allclose(coefficients(given, shaping=shaping), expected, rtol=1e-6)


def test_control_rounded_before_tell_the_pairs_are_tied():
    assert (coefficients(CLOSE.astype(np.float32)) == 0).sum() >= 2


def test_reports_keep_the_values_and_see_no_tie():
    es, state = strategy()
    _, metrics = es.tell(state, CLOSE)
    np.testing.assert_array_equal(metrics.fitness, CLOSE.astype(np.float32))
    assert metrics.tied_pairs == 0 and metrics.invalid == 0


def test_integers_do_not_wrap():
    told = check_told([2**40, 2**40 + 1], None, population_size=2, shaping="pair_sign", integers=False)
    assert told.fitness.tolist() == [2.0**40, 2.0**40] and told.scores.tolist() == [0, 1]
    exact = check_told([2**62, 2**62 + 1], None, population_size=2, shaping="z_score", integers=False)
    assert exact.scores[0] != exact.scores[1]
    with pytest.raises(ValueError, match=r"integer fitness must be less than 2\^30 in size, got 1099511627776"):
        check_told([2**40, 1], None, population_size=2, shaping="pair_sign", integers=True)


def test_float64_beyond_float32_is_the_best_and_not_invalid():
    es, state = strategy()
    _, metrics = es.tell(state, np.array([1e300, 1, 2, 3, 4, 5, 6, 7.0]))
    assert metrics.invalid == 0 and metrics.coefficients[0] == 1  # best against worst


@pytest.mark.parametrize("fitness", [np.arange(8) * 1j, np.array(["a"] * 8), [None] * 8])
def test_what_is_no_real_number_is_refused(fitness):
    es, state = strategy()
    with pytest.raises(TypeError, match="fitness must be real numbers, got"):
        es.tell(state, fitness)


def test_a_shaping_of_the_user_warns_of_values_that_became_equal():
    es, state = strategy(shaping=lambda fitness: fitness)
    with pytest.warns(UserWarning, match="values of the fitness differ from others by less than float32 can tell apart"):
        es.tell(state, CLOSE)


@pytest.mark.parametrize("shaping", SHAPED)
@pytest.mark.parametrize("outlier", [-1e20, 1e20, -3e38, 3e38])
def test_one_finite_outlier_silences_nothing(shaping, outlier):
    fitness = jnp.array([outlier, 1.0, 2.0, 3.0, 4.0, 6.0, 7.0, 9.0])
    shaped = np.asarray(shaping(fitness))
    assert np.isfinite(shaped).all() and np.sign(shaped[0] - shaped[1]) == np.sign(outlier)


@pytest.mark.parametrize("shaping", SHAPED)
def test_tiny_values_are_ordered_and_denormals_never_in_the_wrong_order(shaping):
    """Where the device flushes denormals to zero they are equal."""
    for scale, order in ((1e-37, np.greater), (1e-42, np.greater_equal)):
        shaped = np.asarray(shaping(jnp.arange(1, 9, dtype=jnp.float32) * scale))
        assert np.isfinite(shaped).all() and order(shaped[1::2], shaped[0::2]).all()


def test_statistics_of_huge_values_do_not_overflow():
    es, state = strategy()
    _, metrics = es.tell(state, np.array([3e38, -3e38] * 4, np.float32))
    assert metrics.mean_fitness == 0 and np.isclose(metrics.std_fitness, 3e38, rtol=1e-6)
    assert metrics.best_fitness == np.float32(3e38) and metrics.pair_correlation == 0


def test_float64_stays_float64_where_jax_has_it(standard_promotion):
    with jax.enable_x64(True):
        params = {"w": jnp.full((3, 2), 1 + 1e-12, jnp.float64)}
        es = eggroll.EvolutionStrategy(
            lambda params, x, key: 1e8 + jnp.sum(params["w"] - 1, dtype=jnp.float64),
            population_size=4,
            sigma=1e-7,
            optimizer=optax.sgd(1e-12),
            perturbation=eggroll.Dense(),
            shaping="centered_ranks",
        )
        state = es.init(params, key=jax.random.key(0))
        es.plan(state, X)
        member = es.ask(state).member(0)["w"]
        assert member.dtype == jnp.float64
        noise = np.asarray((member - params["w"]) / 1e-7)  # lost in float32, whose spacing at 1 is 1e-7
        assert len(np.unique(np.round(noise, 6))) == 6
        state, metrics = es.step(state, X)
        assert metrics.fitness.dtype == jnp.float64 and metrics.tied_pairs == 0
        assert state.params["w"].dtype == jnp.float64 and (state.params["w"] != params["w"]).all()


def test_the_last_generation_is_skipped_and_a_run_ends_there():
    es = eggroll.EvolutionStrategy(
        lambda params, x, key: -jnp.sum(params["w"] ** 2), population_size=8, sigma=0.1, optimizer=optax.sgd(0.1)
    )
    state = es.init({"w": jnp.ones((3, 2))}, key=jax.random.key(0))._replace(generation=jnp.int32(LAST_GENERATION - 1))
    state, _ = es.step(state)
    state, metrics = es.step(state)
    assert metrics.skipped and state.generation == LAST_GENERATION
    with pytest.raises(OverflowError, match="a run ends at generation 2,147,483,647"):
        eggroll.train(es, state, generations=1)


def test_a_long_run_keeps_numbers_and_no_arrays():
    es = eggroll.EvolutionStrategy(
        lambda params, x, key: (-jnp.sum(params["w"] ** 2), jnp.ones(3)),
        population_size=8,
        sigma=0.1,
        optimizer=optax.sgd(0.1),
        aux="mean",
    )
    seen, start = [], functools.partial(es.init, {"w": jnp.ones((3, 2))}, key=jax.random.key(0))
    before = len(jax.live_arrays())
    state, history = eggroll.train(es, start(), generations=12, callbacks=[lambda state, record: seen.append(record.aux.shape)])
    assert seen == [(3,)] * 12 and {record.aux for record in history} == {record.coefficients for record in history} == {None}
    assert len(jax.live_arrays()) - before < 12
    kept = eggroll.train(es, start(), generations=2, keep_arrays=True)[1]
    assert [record.coefficients.shape for record in kept] == [(4,), (4,)]
