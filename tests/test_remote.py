"""Fitness outside JAX: told pairs keep the estimate unbiased; Ray workers that die, are late, join and leave."""

import os
import pickle
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll

PARAMS = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}
WEIGHTS = {"w": jnp.arange(12.0).reshape(4, 3) - 5, "b": jnp.array([1.0, -2.0, 0.5])}


def linear(params, batch, key):
    """Its gradient is WEIGHTS."""
    return sum((leaf * weight).sum() for leaf, weight in zip(jax.tree.leaves(params), jax.tree.leaves(WEIGHTS), strict=True))


def centred(fitness):
    return fitness - fitness.mean()


def make(**options):
    options = dict(population_size=16, sigma=0.1, optimizer=optax.sgd(1.0), shaping=centred) | options
    es = eggroll.EvolutionStrategy(linear, **options)
    state = es.init(PARAMS, key=jax.random.key(3))
    es.plan(state)
    return es, state


def estimate(es, state, pairs, fitness):
    """The gradient that a step of plain SGD with rate 1 shows."""
    told = fitness.reshape(-1, 2)[np.asarray(pairs)].reshape(-1)
    new, _ = es.tell(state, told, pairs=pairs)
    moved = jax.tree.map(lambda after, before: after - before, new.params, state.params)
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(moved)])


def test_some_pairs_give_the_mean_of_their_shares_and_all_pairs_change_nothing():
    es, state = make()
    fitness = es.step(state)[1].fitness
    shares = np.stack([estimate(es, state, [pair], fitness) for pair in range(8)])
    np.testing.assert_allclose(estimate(es, state, [5, 0, 2], fitness), shares[[5, 0, 2]].mean(axis=0), rtol=1e-4, atol=1e-4)
    for leaf, whole in zip(*(jax.tree.leaves(es.tell(state, fitness, **o)[0]) for o in ({}, {"pairs": range(8)})), strict=True):
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(leaf, whole)


def test_dropped_pairs_leave_the_estimate_unbiased():
    """The mean over 400 generations, five of eight pairs each, within 5 standard errors of the gradient; not renormalised it
    would be 5 / 8 of it, which is far outside.
    """
    es, state = make()
    rng, estimates = np.random.default_rng(0), []
    step = jax.jit(lambda state: es.step(state)[1].fitness)
    for generation in range(400):
        now = state._replace(generation=jnp.int32(generation))
        estimates.append(estimate(es, now, np.sort(rng.permutation(8)[:5]), np.asarray(step(now))))
    truth = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(WEIGHTS)])
    mean, error = np.mean(estimates, axis=0), np.std(estimates, axis=0) / 20
    assert (np.abs(mean - truth) < 5 * error).all()
    assert not (np.abs(mean * 5 / 8 - truth) < 5 * error).all()  # the control


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ([0, 8], r"pairs must be integers in \[0, 8\), at least one"),
        ([], "at least one"),
        ([1, 1], "every pair once"),
        ([1], r"fitness must have shape \(2,\) or \(2, K\), got \(4,\)"),
    ],
)
def test_wrong_pairs_are_refused(pairs, words):
    es, state = make()
    with pytest.raises(ValueError, match=words):
        es.tell(state, jnp.zeros(4), pairs=pairs)


def test_a_strategy_pickles_with_its_plan():
    es, state = make(optimizer=None or optax.sgd(1.0), shaping="z_score")
    es.step(state)
    again = pickle.loads(pickle.dumps(eggroll_without_closures(es)))
    np.testing.assert_array_equal(again.replay(state, jnp.ones(8)).params["w"], es.replay(state, jnp.ones(8)).params["w"])


def eggroll_without_closures(es):
    """The plain pickle cannot hold optax's closures; Ray's can. What is left is the strategy's own."""

    class Sgd:
        """SGD without closures."""

    object.__setattr__(es, "optimizer", optax.GradientTransformation(_no_state, _sgd))
    del Sgd
    return es


def _no_state(params):
    return ()


def _sgd(updates, state, params=None):
    return jax.tree.map(jnp.negative, updates), state


# --- workers of Ray -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ray():
    """Ray on this machine."""
    ray = pytest.importorskip("ray")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test
    ray.init(num_cpus=4, log_to_driver=False, include_dashboard=False)
    yield ray
    ray.shutdown()


def score(params, key):
    """Plain NumPy."""
    return float(sum((np.asarray(params[name]) * np.asarray(WEIGHTS[name])).sum() for name in params))


def deadly(path):
    """A score whose first call ever kills its process."""

    def score_or_die(params, key):
        if not os.path.exists(path):
            open(path, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return score(params, key)

    return score_or_die


def slow(folder):
    """A score that, once the file "armed" is in the folder, blocks in one worker until the file "released" is there too."""

    def score_or_block(params, key):
        if os.path.exists(f"{folder}/armed"):
            try:
                os.close(os.open(f"{folder}/blocked", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return score(params, key)
            while not os.path.exists(f"{folder}/released"):
                time.sleep(0.05)
        return score(params, key)

    return score_or_block


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_workers_equal_the_engine_and_join_and_leave(ray):
    from eggroll.remote import RemoteEvaluator

    es, state = make()
    local = state
    with RemoteEvaluator(es, score, state, num_workers=1, pairs_per_task=3) as workers:
        for size in (1, 3, 1):
            workers.resize(size)
            fitness, pairs = workers.evaluate(state)
            assert pairs.tolist() == list(range(8)) and workers.report.dropped == workers.report.deaths == 0
            state, metrics = es.tell(state, fitness, pairs=pairs)
            workers.advance(state, metrics)
            local, expected = es.step(local)
            np.testing.assert_allclose(fitness, expected.fitness, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(state.params["w"], local.params["w"], rtol=1e-4)
        with pytest.raises(ValueError, match="the workers are at generation 3, got 0"):
            workers.evaluate(make()[1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_pairs_of_a_killed_worker_go_to_another(ray, tmp_path):
    from eggroll.remote import RemoteEvaluator

    es, state = make()
    with RemoteEvaluator(es, deadly(str(tmp_path / "died")), state, num_workers=2, pairs_per_task=2) as workers:
        fitness, pairs = workers.evaluate(state)
        assert workers.report.deaths == 1 and pairs.tolist() == list(range(8))
        np.testing.assert_allclose(fitness, es.step(state)[1].fitness, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_straggler_is_dropped_and_the_next_generation_goes_on_without_it(ray, tmp_path):
    from eggroll.remote import RemoteEvaluator

    es, state = make()
    with RemoteEvaluator(es, slow(tmp_path), state, num_workers=2, pairs_per_task=2) as workers:
        ready = [worker.evaluate.remote([0]) for worker in workers.workers]
        ray.get(ready)  # both have started and compiled
        (tmp_path / "armed").touch()
        workers.deadline = 10.0
        fitness, pairs = workers.evaluate(state)
        assert workers.report.dropped == 2 and len(pairs) == 6 and len(fitness) == 12
        state, metrics = es.tell(state, fitness, pairs=pairs)
        workers.advance(state, metrics)
        workers.deadline = None
        for _ in range(2):  # without the straggler, whose late result is thrown away; then with it
            fitness, pairs = workers.evaluate(state)
            assert len(pairs) == 8
            np.testing.assert_allclose(fitness, es.step(state)[1].fitness, rtol=1e-4, atol=1e-4)
            (tmp_path / "released").touch()
            ray.get([worker.generation.remote() for worker in workers.workers])  # it is free again


def failing(calls):
    """A score that fails on the first members of a worker, or on all."""

    def score_or_fail(params, key):
        seen.append(0)
        if len(seen) <= calls:
            raise KeyError("no such answer")
        return score(params, key)

    seen = []
    return score_or_fail


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_errors_of_the_score_are_told(ray):
    from eggroll.remote import RemoteEvaluator

    es, state = make()
    with RemoteEvaluator(es, failing(3), state, num_workers=1, pairs_per_task=4) as workers:
        with pytest.warns(UserWarning, match="the score failed on 3 of 16 members: KeyError: 'no such answer'"):
            fitness, pairs = workers.evaluate(state)
        assert len(pairs) == 8 and np.isnan(fitness).sum() == 3 and len(workers.report.errors) == 3
        assert np.isfinite(workers.evaluate(state)[0]).all() and not workers.report.errors
    words = "the score failed on all 16 members; the first error was KeyError"
    with RemoteEvaluator(es, failing(1000), state, num_workers=1) as workers, pytest.raises(RuntimeError, match=words):
        workers.evaluate(state)


@pytest.mark.parametrize("name", ["num_workers", "pairs_per_task", "deadline"])
def test_wrong_counts_are_refused(name):
    pytest.importorskip("ray")
    from eggroll.remote import RemoteEvaluator

    es, state = make()
    with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
        RemoteEvaluator(es, score, state, **{"num_workers": 1, name: 0})
