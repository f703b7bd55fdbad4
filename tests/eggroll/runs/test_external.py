"""Fitness computed outside JAX: equal to the one inside, exact resume, clear errors."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll
from eggroll.journal.checkpoint import Checkpoints

PARAMS = {"w": jnp.eye(4), "b": jnp.ones(4)}
X = np.linspace(-1, 1, 20, dtype=np.float32).reshape(5, 4)


def model(params, x):
    return jnp.tanh(x @ params["w"]) + params["b"]


def fitness(params, x, key):
    return -((model(params, x) - 1.0) ** 2).mean()


def score(outputs, known):
    return -((outputs - known) ** 2).mean(axis=(1, 2)), {"seen": outputs.shape}


def strategy(inside=None, **options):
    settings = dict(population_size=12, sigma=0.1, optimizer=optax.sgd(0.5)) | options
    return eggroll.EvolutionStrategy(inside, **settings)


def external(**options):
    return eggroll.External(strategy(**options), model, score)


def test_equal_to_a_fitness_in_jax():
    inside, outside = strategy(fitness), external()
    states = [es.init(PARAMS, key=jax.random.key(0)) for es in (inside, outside)]
    for _ in range(3):
        states[0], expected = inside.step(states[0], X)
        states[1], metrics = outside.step(states[1], (X, 1.0))
        np.testing.assert_allclose(metrics.fitness, expected.fitness, rtol=1e-5)
    assert metrics.aux == {"seen": (12, 5, 4)}
    for a, b in zip(*(jax.tree.leaves(state.params) for state in states), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    assert np.abs(states[0].params["w"] - PARAMS["w"]).max() > 1e-3  # control: it moved


def test_it_trains_and_resumes_bit_for_bit(tmp_path):
    def run(folder, generations):
        es = external()
        initial = es.init(PARAMS, key=jax.random.key(0))
        es.plan(initial, (X, 1.0))
        with contextlib.closing(eggroll.DurableRun(folder, es, initial, config={}, checkpoint_every=3)) as durable:
            left = generations - int(durable.state.generation)
            return eggroll.train(es, durable.state, (X, 1.0), generations=left, durable=durable, run_folder=folder)

    whole, _ = run(tmp_path / "whole", 7)
    run(tmp_path / "parts", 5)
    parts, history = run(tmp_path / "parts", 7)
    assert [record.generation for record in history] == [5, 6]
    jax.tree.map(np.testing.assert_array_equal, parts.params, whole.params)


def test_a_member_without_a_score_is_worst_and_counted():
    es = external()
    broken = eggroll.External(es.es, model, lambda outputs, _: np.where(np.arange(12) == 3, np.nan, 1.0))
    _, metrics = broken.step(broken.init(PARAMS, key=jax.random.key(0)), (X, None))
    assert int(metrics.invalid) == 1


def test_wrong_use():
    with pytest.raises(ValueError, match="es must have fitness=None"):
        eggroll.External(strategy(fitness), model, score)
    short = eggroll.External(strategy(), model, lambda outputs, known: np.zeros(5))
    with pytest.raises(ValueError, match=r"fitness must have shape \(12,\) or \(12, K\), got \(5,\)"):
        short.step(short.init(PARAMS, key=jax.random.key(0)), (X, None))


def test_columns_of_prompts_in_groups_of_members():
    """Two groups of two members, two prompts each: every group and prompt has its own mean, all share the deviation."""
    values = np.array([[1.0, 10.0], [3.0, 14.0], [0.0, 5.0], [8.0, 5.0]], np.float32)
    centred = np.array([[-1.0, -2.0], [1.0, 2.0], [-4.0, 0.0], [4.0, 0.0]])
    centres = values - centred
    spread = np.sqrt(values.var() + 1e-5)
    assert np.unique(centres).size == 4
    np.testing.assert_allclose(
        eggroll.group_relative(jnp.asarray(values), group_size=2), (centred / spread).mean(axis=1), rtol=1e-5
    )


def test_anchored_decay_pulls_to_the_beginning():
    optimizer = optax.chain(eggroll.anchored_decay(0.1), optax.sgd(1.0))
    start = {"w": jnp.array([1.0, 2.0])}
    state, params = optimizer.init(start), {"w": jnp.array([3.0, 2.0])}
    updates, state = optimizer.update({"w": jnp.zeros(2)}, state, params)
    np.testing.assert_allclose(updates["w"], [-0.2, 0.0], rtol=1e-6)
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="rate must be a finite number >= 0"):
            eggroll.anchored_decay(wrong)
    with pytest.raises(ValueError, match="anchored_decay needs the parameters"):
        optimizer.update({"w": jnp.zeros(2)}, state)


def test_anchored_decay_keeps_a_run_near_its_beginning():
    """Without any signal the weights stay; with one they end nearer than without the decay."""
    ends = []
    for rate in (0.0, 0.5):
        es = strategy(fitness, optimizer=optax.chain(eggroll.anchored_decay(rate), optax.sgd(0.5)))
        state = es.init(PARAMS, key=jax.random.key(0))
        for _ in range(20):
            state, _ = es.step(state, X)
        ends.append(
            sum(float(jnp.abs(a - b).sum()) for a, b in zip(*map(jax.tree.leaves, (state.params, PARAMS)), strict=True))
        )
    assert 0 < ends[1] < 0.8 * ends[0]


def test_the_best_checkpoint_is_kept_and_known_after_reopening(tmp_path):
    es = strategy(fitness)
    state = es.init(PARAMS, key=jax.random.key(0))
    written = Checkpoints(tmp_path, config={}, keep=1)
    assert written.best is None
    for score in (0.1, 0.9, None, 0.5):
        state, _ = es.step(state, X)
        written.save(state, score=score)
    written.wait()
    assert written.best == 2 and written.generations == [2, 4]
    written.close()
    again = Checkpoints(tmp_path, config={}, keep=1)
    assert again.best == 2
    again.close()
