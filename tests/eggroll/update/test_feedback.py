"""Error feedback for int8 parameters: rebuilt residuals against stored ones, and what a run keeps, resumes and refuses."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll
from eggroll.noise import addresses
from eggroll.noise.regions import LIMIT
from eggroll.update import estimator
from eggroll.update.precision import rounding_words, uniforms
from tests.tables import slow

WINDOW, SHAPE, PAIRS, RATE = 4, (12, 16), 8, 2.0
EDGES = jnp.asarray(np.random.default_rng(0).choice([-127, -126, 0, 126, 127], SHAPE), jnp.int8)


def fitness(params, batch, key):
    return -jnp.mean((batch @ params["w"].astype(batch.dtype)) ** 2)


def strategy(optimizer=None, function=fitness, **options):
    options = {"precision": eggroll.Feedback(WINDOW), "shaping": lambda fitness: fitness, "sigma": 0.5} | options
    optimizer = optimizer or optax.sgd(RATE)
    return eggroll.EvolutionStrategy(function, population_size=2 * PAIRS, optimizer=optimizer, **options)


def start(es, weights=EDGES, **others):
    state = es.init({"w": weights} | others, key=jax.random.key(0))
    es.plan(state, jnp.ones((2, weights.shape[0])))
    return state


def told(generation):
    """Fitness in eighths, with which every product and sum of an estimate is exact in float32."""
    return np.random.default_rng(generation).integers(-8, 9, 2 * PAIRS).astype(np.float32) / 8


def stored_residuals(steps):
    """Weights after every step, from residuals that are kept; and how many weights a step would have moved too far."""
    es = strategy()
    plan, key = es.plan(start(es)), jax.random.key(0)
    weights, lost, history = np.asarray(EDGES, np.int32), 0, []
    for step in range(steps):
        if step % WINDOW == 0:
            words_key = jax.random.fold_in(jax.random.fold_in(addresses.stream_key(key, 2), step // WINDOW), 0)
            residual = np.asarray(uniforms(rounding_words(words_key, SHAPE, (0, 0), SHAPE)))
        coefficients = estimator.pair_coefficients(jnp.asarray(told(step)))
        leaf = plan.leaves[0]
        estimate = estimator.leaf_gradient(leaf, coefficients, noise_key=key, noise_generation=step, sigma=0.5)
        total = residual + np.float32(RATE) * np.asarray(estimate)
        moves = np.floor(total).astype(np.int32) - np.floor(residual).astype(np.int32)
        residual = total  # its whole part counts as moved already
        lost += int((np.abs(weights + moves) > 127).sum())
        weights = np.clip(weights + moves, -127, 127)
        history.append(weights)
    return history, lost


@pytest.mark.parametrize("limit", [slow(LIMIT), 40])
def test_rebuilt_residuals_are_those_that_are_kept(limit, monkeypatch):
    monkeypatch.setattr("eggroll.noise.regions.LIMIT", limit)
    wanted, lost = stored_residuals(2 * WINDOW + 2)
    assert lost > 20  # the boundary is hit
    es = strategy()
    state = start(es)
    for step, weights in enumerate(wanted):
        state, _ = es.tell(state, told(step))
        np.testing.assert_array_equal(state.params["w"], weights)


def constant(update):
    """An optimizer whose update is the same for every weight and step."""
    return optax.stateless(lambda updates, params: jax.tree.map(lambda u: jnp.full_like(u, update), updates))


def moved(precision, steps=40):
    es = strategy(constant(0.05), precision=precision)
    state = start(es, jnp.zeros((64, 64), jnp.int8))
    for _ in range(steps):
        state, _ = es.tell(state, told(0))
    return np.asarray(state.params["w"], np.float32)


@pytest.mark.slow
def test_small_updates_add_up_with_less_noise_than_stochastic_rounding():
    feedback, stochastic = moved(eggroll.Feedback(WINDOW)), moved("stochastic")
    for result in (feedback, stochastic):
        assert abs(result.mean() - 2) < 5 * result.std() / 64
    assert feedback.std() < 0.95 * stochastic.std()  # windows of 4 steps of 0.05: sqrt(0.8 / 0.95) = 0.92
    assert abs(moved(eggroll.Feedback(40)) - 2).max() <= 1  # one window
    assert not moved("nearest").any()  # control: lost


def test_one_step_a_window_is_stochastic_rounding():
    es = strategy(constant(0.3), precision=eggroll.Feedback(1))
    state, _ = es.tell(start(es, jnp.zeros((64, 64), jnp.int8)), told(0))
    first = np.asarray(state.params["w"])
    second = np.asarray(es.tell(state, told(1))[0].params["w"]) - first
    assert set(np.unique(first)) == {0, 1} and abs(first.mean() - 0.3) < 0.04
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.08  # the steps' random bits are independent


def mixed(params, batch, key):
    return fitness(params, batch + params["b"], key) + params["short"].astype(jnp.float32).sum()


MIXED = {"b": jnp.zeros(12), "short": jnp.ones(5, jnp.bfloat16)}


def mixed_strategy(**options):
    optimizer = optax.multi_transform(
        {"int8": optax.sgd(0.1), "float": optax.adam(0.01)}, {"w": "int8", "b": "float", "short": "float"}
    )
    return strategy(optimizer, mixed, sigma=0.3, shaping="centered_ranks", **options)


@pytest.mark.slow
def test_a_run_of_mixed_parameters_resumes_and_replays_to_the_bit(tmp_path, standard_promotion):
    """Resumed in the middle of a window, and rebuilt from scalars alone."""
    es, batch = mixed_strategy(), jnp.ones((2, 12))

    def run(folder, generations):
        run = eggroll.DurableRun(tmp_path / folder, es, start(es, **MIXED), config={}, checkpoint_every=3)
        with contextlib.closing(run) as durable:
            left = generations - int(durable.state.generation)
            return eggroll.train(es, durable.state, lambda g: batch + g, generations=left, durable=durable)[0]

    whole = run("whole", 9)
    run("parts", 2 * WINDOW - 2)
    resumed = run("parts", 9)
    assert es.checksums(resumed) == es.checksums(whole)
    assert all(master is None for master in whole.masters)
    state, other = start(es, **MIXED), []
    for generation in range(9):
        before = eggroll.copy_state(state)
        state, metrics = es.step(before, batch + generation)
        other.append((np.asarray(metrics.coefficients), metrics.mean_fitness, metrics.checksums[1]))
    assert es.checksums(state) == es.checksums(whole)
    state = start(es, **MIXED)
    for coefficients, mean, checksums in other:
        state = es.replay(state, coefficients, mean_fitness=mean, checksums=checksums)


def test_a_skipped_generation_is_no_step_of_a_window():
    es = strategy()
    state, _ = es.tell(start(es), told(0))
    before = jax.tree.map(np.asarray, (state.params, state.opt_state))
    state, metrics = es.tell(state, np.full(2 * PAIRS, np.nan, np.float32))
    assert bool(metrics.skipped)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, (state.params, state.opt_state)))


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (optax.sgd(0.1, momentum=0.9), "from their gradients alone, such as optax.sgd .* that of 'w' also depends on a state"),
        (optax.sgd(lambda count: 0.1 / (1 + count)), "'w' also depends on a state"),
        (optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1)), "'w' also depends on .* parameters"),
        (optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), None),  # of a single parameter
    ],
)
def test_an_optimizer_whose_past_updates_cannot_be_computed_is_refused(optimizer, message, standard_promotion):
    es = strategy(optimizer)
    if message is None:
        start(es)
        return
    with pytest.raises(ValueError, match=message):
        start(es)


def test_settings_without_effect_or_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"window must be an integer >= 1, got 0"):
        eggroll.Feedback(0)
    with pytest.raises(ValueError, match=r"Feedback\(window=4\) has no effect: no parameter that evolves is quantised"):
        strategy().init({"w": jnp.ones((4, 4), jnp.bfloat16)}, key=jax.random.key(0))
    with pytest.raises(ValueError, match="or a Feedback, got 'feedback'"):
        strategy(precision="feedback")
