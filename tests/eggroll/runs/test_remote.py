"""Fitness outside JAX: a subset of pairs keeps the estimate unbiased; workers fail, die, are late, join and leave."""

import collections
import contextlib
import functools
import os
import pickle
import signal
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll
from eggroll import programs
from eggroll.plans import adopt_plans, plans_of
from eggroll.runs.remote import RemoteEvaluator

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
    new, _ = es.tell(eggroll.copy_state(state), told, pairs=pairs)
    moved = jax.tree.map(lambda after, before: after - before, new.params, state.params)
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(moved)])


def test_some_pairs_give_the_mean_of_their_shares_and_all_pairs_change_nothing():
    es, state = make()
    fitness = es.step(eggroll.copy_state(state))[1].fitness
    shares = np.stack([estimate(es, state, [pair], fitness) for pair in range(8)])
    np.testing.assert_allclose(estimate(es, state, [5, 0, 2], fitness), shares[[5, 0, 2]].mean(axis=0), rtol=1e-4, atol=1e-4)
    every, all_pairs = (es.tell(eggroll.copy_state(state), fitness, **o)[0] for o in ({}, {"pairs": range(8)}))
    for leaf, whole in zip(*map(jax.tree.leaves, (every, all_pairs)), strict=True):
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


def test_a_strategy_and_its_plans_are_all_that_another_process_needs(monkeypatch):
    sgd = optax.GradientTransformation(_no_state, _sgd)  # plain pickle refuses optax's closures
    es, state = make(shaping="z_score", optimizer=sgd)
    state, _ = es.step(state)
    expected = es.replay(eggroll.copy_state(state), jnp.ones(8)).params["w"]
    pickled = pickle.dumps((es, plans_of(es)))
    monkeypatch.setattr(programs, "_entries", type(programs._entries)())  # as in another process
    other, plans = pickle.loads(pickled)
    with pytest.raises(ValueError, match="replay needs the plan"):
        other.replay(state, jnp.ones(8))
    adopt_plans(other, plans)
    np.testing.assert_array_equal(other.replay(state, jnp.ones(8)).params["w"], expected)


def _no_state(params):
    return ()


def _sgd(updates, state, params=None):
    return jax.tree.map(jnp.negative, updates), state


# --- the evaluator, with a stand-in for Ray that runs every call at once, in this process ---------------------------------


class Died(Exception):
    """Stands for RayActorError."""


class Reference:
    """The outcome of a call."""

    def __init__(self, function, *arguments, worker=None):
        self.worker, self.value, self.error = worker, None, None
        try:
            self.value = function(*(get(x) if isinstance(x, Reference) else x for x in arguments))
        except Exception as error:
            self.error = error


def get(reference):
    if reference.error is not None:
        raise reference.error
    return reference.value


def die(*arguments):
    raise Died("gone")


class Handle:
    """Of a worker: `handle.method.remote(...)`."""

    def __init__(self, ray, actor):
        self.ray, self.actor, self.calls = ray, actor, collections.Counter()

    def __getattr__(self, name):
        self.calls[name] += 1
        dead = self in self.ray.dead or self.ray.all_die
        remote = functools.partial(Reference, die if dead else getattr(self.actor, name), worker=self)
        return types.SimpleNamespace(remote=remote)


class StandIn:
    """Of Ray: results of the workers in `held` do not come, calls of those in `dead` fail."""

    def __init__(self):
        self.held, self.dead, self.all_die = set(), set(), False
        self.exceptions = types.SimpleNamespace(RayActorError=Died)

    def is_initialized(self):
        return True

    def get(self, reference):
        return die() if reference.worker in self.dead else get(reference)

    def put(self, value):
        return Reference(lambda: value)

    def kill(self, worker):
        self.dead.add(worker)

    def wait(self, references, timeout):
        ready = [reference for reference in references if reference.worker not in self.held]
        assert ready or timeout is not None, "nothing would ever come"
        return ready[:1], None

    def remote(self, kind):
        start = types.SimpleNamespace(remote=lambda *arguments: Handle(self, kind(*map(get, arguments))))
        return types.SimpleNamespace(options=lambda **options: start)


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", StandIn())
    return sys.modules["ray"]


def score(params, key):
    """Plain NumPy."""
    return float(sum((np.asarray(params[name]) * np.asarray(WEIGHTS[name])).sum() for name in params))


def check(workers, es, state):
    """All pairs come, with the fitness of the engine."""
    fitness, pairs = workers.evaluate(state)
    assert pairs.tolist() == list(range(8)) and workers.report.dropped == workers.report.failed == 0
    np.testing.assert_allclose(fitness, es.step(eggroll.copy_state(state))[1].fitness, rtol=1e-4, atol=1e-4)
    return fitness, pairs


def go_on(workers, es, state, fitness, pairs):
    state, metrics = es.tell(state, fitness, pairs=pairs)
    workers.advance(state, metrics)
    return state


def failing(fails):
    """A score that raises an error where `fails(number of its call)`."""
    calls = iter(range(10_000))

    def score_or_fail(params, key):
        if fails(next(calls)):
            raise KeyError("no such answer")
        return score(params, key)

    return score_or_fail


def test_errors_of_the_score_are_warned_of_once(stand_in):
    es, state = make()
    workers = RemoteEvaluator(es, failing(lambda call: call < 3 or call == 16), state, num_workers=1, pairs_per_task=4)
    with pytest.warns(UserWarning, match="the score failed on 3 of 16 members: KeyError: 'no such answer'"):
        fitness, pairs = workers.evaluate(state)
    assert len(pairs) == 8 and np.isnan(fitness).tolist() == [True] * 3 + [False] * 13
    assert (workers.report.failed, workers.report.error) == (3, "KeyError: 'no such answer'")
    workers.evaluate(state)
    assert workers.report.failed == 1
    check(workers, es, state)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (failing(lambda call: True), "KeyError: 'no such answer'"),
        (lambda p, k: None, "TypeError"),
        (lambda p, k: p["b"], "TypeError"),
    ],
)
def test_a_score_that_always_fails_is_an_error(stand_in, wrong, words):
    es, state = make()
    workers = RemoteEvaluator(es, wrong, state, num_workers=2)
    with pytest.raises(RuntimeError, match=f"the score failed on all 16 members; the first error was {words}"):
        workers.evaluate(state)


def test_late_results_are_discarded_and_a_lost_worker_is_replaced(stand_in, monkeypatch):
    monkeypatch.setattr("eggroll.runs.remote.MANY_GENERATIONS", 2)
    es, state = make()
    workers = RemoteEvaluator(es, score, state, num_workers=2, pairs_per_task=2, deadline=1000)
    check(workers, es, state)
    late, _ = workers.workers
    stand_in.held.add(late)
    fitness, pairs = workers.evaluate(state)
    assert workers.report.dropped == 2 and len(fitness) == 12
    state = go_on(workers, es, state, fitness, pairs)
    workers.deadline = None
    check(workers, es, state)
    (task,) = (reference for reference in workers._running if reference.worker is late)
    task.value = ([1e9] * 4, 4, "late")
    stand_in.held, before = set(), late.calls["evaluate"]
    check(workers, es, state)
    assert late.calls["evaluate"] > before  # it has work again
    stand_in.held, workers.deadline = {late}, 1000
    told = workers.evaluate(state)
    for generation in range(3):
        assert late in workers.workers
        state = go_on(workers, es, state, *told)
        told = check(workers, es, state) if generation < 2 else None
    assert late in stand_in.dead and len(workers.workers) == 2 and workers.report.deaths == 1
    check(workers, es, state)
    assert workers.workers[1].calls["evaluate"]  # the new one


def test_a_worker_that_starts_late_is_not_waited_for_and_gets_the_current_state(stand_in):
    es, state = make()
    workers = RemoteEvaluator(es, score, state, num_workers=2, pairs_per_task=2)
    first, second = workers.workers
    stand_in.held = {second}
    for _ in range(2):
        state = go_on(workers, es, state, *check(workers, es, state))
    assert not second.calls["load"]
    stand_in.held = set()
    state = go_on(workers, es, state, *check(workers, es, state))
    assert second.calls["load"] and second.calls["evaluate"] and int(second.actor._state.generation) == 3
    stand_in.held, workers.deadline = {second}, 1000
    assert len(workers.evaluate(state)[1]) == 6
    workers.resize(1)  # while one that leaves has pairs
    stand_in.held = set()
    check(workers, es, state)
    assert workers.report.deaths == 0 and workers.workers == (first,)


def test_a_worker_that_dies_between_generations_is_replaced_a_limited_number_of_times(stand_in):
    es, state = make()
    workers = RemoteEvaluator(es, score, state, num_workers=2, pairs_per_task=2)
    state = go_on(workers, es, state, *check(workers, es, state))
    stand_in.dead.add(workers.workers[0])
    check(workers, es, state)
    assert workers.report.deaths == 1 and len(workers.workers) == 2
    stand_in.all_die = True
    with pytest.raises(RuntimeError, match="workers die as fast as they start: gone"):
        workers.evaluate(state)


def test_an_error_of_an_update_is_raised(stand_in):
    es, state = make()
    workers = RemoteEvaluator(es, score, state, num_workers=2)
    told = check(workers, es, state)
    workers.workers[0].actor.advance = lambda *arguments: 1 / 0
    state = go_on(workers, es, state, *told)
    with pytest.raises(ZeroDivisionError):
        workers.evaluate(state)


def test_another_sigma_reaches_the_workers(stand_in):
    es, state = make()
    workers = RemoteEvaluator(es, score, state, num_workers=1)
    state = state._replace(sigma=jnp.float32(0.3))
    state = go_on(workers, es, state, *check(workers, es, state))
    np.testing.assert_array_equal(workers.workers[0].actor._state.params["w"], state.params["w"])
    check(workers, es, state._replace(sigma=jnp.float32(0.2)))


def test_wrong_calls_are_refused(stand_in):
    es, state = make()
    workers = RemoteEvaluator(es, score, state, num_workers=1)
    for number in (0, -1):
        with pytest.raises(ValueError, match=f"num_workers must be positive, got {number}"):
            workers.resize(number)
    later, metrics = es.tell(state, *(check(workers, es, state)[:1]))
    with pytest.raises(ValueError, match="the workers are at generation 0, got metrics of 0 and a state of 0"):
        workers.advance(state, metrics)
    workers.advance(later, metrics)
    with pytest.raises(ValueError, match="the workers are at generation 1, got 0"):
        workers.evaluate(state)
    workers.close()
    with pytest.raises(RuntimeError, match="there are no workers"):
        workers.evaluate(later)


@pytest.mark.parametrize("name", ["num_workers", "pairs_per_task", "deadline"])
def test_wrong_counts_are_refused(stand_in, name):
    es, state = make()
    with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
        RemoteEvaluator(es, score, state, **{"num_workers": 1, name: 0})


# --- workers of Ray -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ray():
    """Ray on this machine."""
    ray = pytest.importorskip("ray")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test
    options = dict(
        log_to_driver=False, include_dashboard=False, _system_config={"worker_niceness": 0}
    )  # not last in a full gate
    ray.init("local", num_cpus=2, object_store_memory=100 * 2**20, **options)
    yield ray
    ray.shutdown()


def deadly(path):
    """A score whose first call ever kills its process."""

    def score_or_die(params, key):
        if not os.path.exists(path):
            open(path, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return score(params, key)

    return score_or_die


def meet(folder, place, count):
    """Let every worker wait in its next call of `meeting` until so many are in the same place."""
    os.mkdir(f"{folder}/{place}")
    (folder / "new").write_text(f"{place} {count}")
    os.replace(folder / "new", folder / "meet")


def meeting(folder):
    """A score that waits as `meet` says; where a file "block" is, the worker that takes it waits until it is back."""

    def score_in_company(params, key):
        with contextlib.suppress(FileNotFoundError):
            os.rename(f"{folder}/block", f"{folder}/taken")
            while os.path.exists(f"{folder}/taken"):
                time.sleep(0.02)
        place, count = (folder / "meet").read_text().split()
        open(f"{folder}/{place}/{os.getpid()}", "w").close()
        while len(os.listdir(f"{folder}/{place}")) < int(count):
            time.sleep(0.02)
        return score(params, key)

    return score_in_company


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_workers_equal_the_engine_and_join_and_leave(ray, tmp_path):
    es, state = make()
    local = eggroll.copy_state(state)
    with RemoteEvaluator(es, meeting(tmp_path), state, num_workers=1, pairs_per_task=3) as workers:
        for place, count in (("a", 1), ("b", 2), ("c", 1)):
            meet(tmp_path, place, count)  # so all have work
            workers.resize(count)
            state = go_on(workers, es, state, *check(workers, es, state))
            assert workers.report.deaths == 0
            local, _ = es.step(local)
        np.testing.assert_allclose(state.params["w"], local.params["w"], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_pairs_of_a_killed_worker_go_to_another(ray, tmp_path):
    es, state = make()
    with RemoteEvaluator(es, deadly(str(tmp_path / "died")), state, num_workers=2, pairs_per_task=2) as workers:
        check(workers, es, state)
        assert workers.report.deaths == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_straggler_is_dropped_and_rejoins_later(ray, tmp_path):
    es, state = make()
    with RemoteEvaluator(es, meeting(tmp_path), state, num_workers=2, pairs_per_task=2) as workers:
        meet(tmp_path, "warm", 2)
        check(workers, es, state)  # both have started and compiled
        meet(tmp_path, "alone", 1)
        (tmp_path / "block").touch()
        workers.deadline = 10.0
        fitness, pairs = workers.evaluate(state)
        assert workers.report.dropped == 2 and len(pairs) == 6 and len(fitness) == 12
        state = go_on(workers, es, state, fitness, pairs)
        workers.deadline = None
        state = go_on(workers, es, state, *check(workers, es, state))  # without the straggler
        (tmp_path / "taken").unlink()
        ray.get([worker.ready.remote() for worker in workers.workers])  # its late result is there
        meet(tmp_path, "again", 2)
        check(workers, es, state)
        assert workers.report.deaths == 0
