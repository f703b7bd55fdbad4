"""Several generations in one program: the bits, the journal and the metrics of one after the other, killed or not."""

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll
from eggroll import zo
from eggroll.journal import Reader
from eggroll.journal.records import Writer
from eggroll.runs.metrics import read_metrics
from eggroll.scan import run_scan
from eggroll.state import copy_state
from eggroll.update.checksums import OtherState
from tests.test_readme import code_blocks

K = 4
PARAMS = {"w": jnp.arange(12, dtype=jnp.float32).reshape(4, 3) / 10, "b": jnp.zeros(3)}
HALF = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
STATE = jnp.zeros(3)
TIMES = ("seconds", "members_per_second")


def fitness(params, batch, key):
    """Noise, and an aux that makes the next batch."""
    output = jnp.tanh(jnp.ones((1, 4)) @ params["w"] + params["b"])
    return -jnp.square(output - batch).mean() + 0.01 * jax.random.normal(key), output.mean()


def next_batch(batch, metrics):
    return 0.9 * batch + 0.1 * metrics.aux


def sigma(generation):
    return 0.1 - 0.007 * generation.astype(jnp.float32)


@functools.cache  # compiled once for all tests
def strategy():
    optimizer = optax.sgd(0.05, momentum=0.9)
    return eggroll.EvolutionStrategy(fitness, population_size=8, sigma=sigma, optimizer=optimizer, aux="mean")


def initial():
    return strategy().init(PARAMS, key=jax.random.key(3))


class Total:
    """What a front end keeps: the batch, and a total; `seen` are the generations after which the callback was called."""

    def __init__(self):
        self.batch, self.total, self.seen = jnp.float32(1.0), 0.0, []

    def on_record(self, record):
        self.batch, self.total = record.batch, self.total + float(record.aux)
        record.extra["total"] = self.total

    def callback(self, state, record):
        assert int(state.generation) == record.generation + 1
        self.seen.append(record.generation)

    def save(self):
        return {"batch": np.asarray(self.batch), "total": np.float64(self.total)}

    def load(self, saved):
        self.batch, self.total = jnp.asarray(saved["batch"]), float(saved["total"])


def go(folder, generations, *, on_device, callbacks=(), checkpoint_every=2 * K, **options):
    """Continue the run of a folder up to a generation."""
    es, kept = strategy(), Total()
    state = initial()
    es.plan(state, kept.batch)
    run = eggroll.DurableRun(folder, es, state, config={}, carried=kept, checkpoint_every=checkpoint_every)
    try:
        state, history = eggroll.train(
            es,
            run.state,
            kept.batch,
            generations=generations - int(run.state.generation),
            next_batch=next_batch,
            on_record=kept.on_record,
            callbacks=[kept.callback, *callbacks],
            run_folder=folder,
            durable=run,
            progress=False,
            on_device=on_device,
            **options,
        )
    finally:
        run.close()
    return SimpleNamespace(state=state, history=history, kept=kept)


def values(tree):
    """The arrays of a tree; keys, which never change, are left out."""
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree) if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]


def assert_same(left, right):
    """Same bits."""
    for one, other in zip(values(left), values(right), strict=True):
        np.testing.assert_array_equal(one, other)


def lines(folder):
    """The metrics of a folder, without times."""
    return [{name: value for name, value in line.items() if name not in TIMES} for line in read_metrics(folder)]


def assert_same_run(one, other):
    """Two folders have the same journal and metrics."""
    assert (one / "journal.bin").read_bytes() == (other / "journal.bin").read_bytes()
    assert lines(one) == lines(other)
    assert [line["generation"] for line in lines(one)] == list(range(len(lines(one))))


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Ten generations one after the other."""
    folder = tmp_path_factory.mktemp("reference")
    return folder, go(folder, 10, on_device=1)


def test_the_journal_the_metrics_and_the_state_are_those_of_one_generation_after_the_other(tmp_path, reference):
    folder, single = reference
    scanned = go(tmp_path, 10, on_device=K, checkpoint_every=3)
    assert_same(scanned.state, single.state)
    assert_same_run(tmp_path, folder)
    assert scanned.kept.total == single.kept.total and scanned.kept.seen == [2, 3, 5, 7, 8, 9]
    checkpoints = sorted(int(path.name) for path in (tmp_path / "checkpoints" / "states").iterdir() if path.name.isdigit())
    assert checkpoints == [3, 6, 9]  # where a scan ends, too


@pytest.mark.parametrize("stopped", [2, 5])
def test_a_run_that_was_interrupted_resumes_at_its_last_record(tmp_path, reference, monkeypatch, stopped):
    """The process ends in the middle of the records of a scan: those that were written are kept."""
    append = Writer.append

    def until(self, entry):
        append(self, entry)
        if entry.generation == stopped:
            raise KeyboardInterrupt

    monkeypatch.setattr(Writer, "append", until)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, 10, on_device=K)
    monkeypatch.undo()
    assert len(list(Reader(tmp_path / "journal.bin"))) == stopped + 1
    resumed = go(tmp_path, 10, on_device=K)
    assert resumed.history[0].generation == stopped + 1
    assert resumed.kept.seen == [seen for seen in (3, 7, 9) if seen > stopped]  # where an uninterrupted run calls it
    assert_same(resumed.state, reference[1].state)
    assert_same_run(tmp_path, reference[0])


def test_target_budget_and_quiet_count_whole_scans(tmp_path, reference):
    means = [record.mean_fitness for record in reference[1].history]
    early = go(tmp_path / "target", 10, on_device=K, target=means[1])
    assert len(early.history) == K and early.kept.seen == [3]
    quiet = iter([1, 2, 5, 9, 9])
    cut = go(tmp_path / "quiet", 10, on_device=K, quiet=lambda: next(quiet))
    assert cut.kept.seen == [0, 2, 3, 7, 9]
    assert_same_run(tmp_path / "quiet", reference[0])


def test_batches_of_a_function_or_an_iterator_are_stacked():
    es, start = strategy(), initial()
    batches = [jnp.float32(index / 4) for index in range(7)]
    asked = []

    def batch_of(generation):
        asked.append(generation)
        return batches[generation]

    single, _ = eggroll.train(es, copy_state(start), batch_of, generations=6, progress=False)
    scanned, _ = eggroll.train(es, copy_state(start), batch_of, generations=6, progress=False, on_device=K)
    assert asked == [*range(6), *range(6)]
    assert_same(single, scanned)
    source = iter(batches)
    ended, history = eggroll.train(es, copy_state(start), source, generations=6, progress=False, on_device=K)
    assert_same(single, ended)
    assert next(source) is batches[6]  # none was lost
    _, history = eggroll.train(es, start, iter(batches), generations=20, progress=False, on_device=K)
    assert len(history) == 7


@pytest.mark.parametrize("left", [1, 2])
def test_a_shorter_last_scan_compiles_nothing(left):
    es = strategy()
    train = functools.partial(eggroll.train, es, batches=jnp.float32(1), progress=False, next_batch=next_batch)
    state, _ = train(initial(), generations=2 * K, on_device=K)
    with pytest.MonkeyPatch.context() as patch:
        compiled, compile_now = [], jax._src.compiler.compile_or_get_cached

        def count(*given, **named):
            compiled.append(given)
            return compile_now(*given, **named)

        patch.setattr(jax._src.compiler, "compile_or_get_cached", count)
        state, _ = train(state, generations=K + left, on_device=K)
    assert not compiled
    single, _ = train(initial(), generations=2 * K)
    single, _ = train(single, generations=K + left)  # from the first batch again
    assert_same(single, state)


def test_an_update_that_rounds_otherwise_in_a_scan_runs_one_by_one_instead(tmp_path, reference, monkeypatch):
    def replay(self, state, *given, **known):
        raise OtherState(["params/w"])

    monkeypatch.setattr(eggroll.EvolutionStrategy, "replay", replay)
    with pytest.warns(UserWarning, match=r"replay does \(params/w differ after generation 0\): generations run one by one"):
        go(tmp_path, 10, on_device=K)
    assert_same_run(tmp_path, reference[0])


def test_wrong_arguments_are_clear_errors():
    es, state = strategy(), initial()
    go_on = functools.partial(eggroll.train, progress=False, generations=8)
    for wrong in (0, 2.0, True):
        with pytest.raises(ValueError, match=f"on_device must be an integer >= 1, got {wrong}"):
            go_on(es, state, jnp.float32(1), on_device=wrong)
    with pytest.raises(ValueError, match="next_batch makes all batches but the first, which batches must be"):
        go_on(es, state, lambda generation: jnp.float32(1), next_batch=next_batch)
    scan = functools.partial(run_scan, es, copy_state(state))
    for count in (0, 7):
        with pytest.raises(ValueError, match=f"count must be from 1 to length, 4, got {count}"):
            scan(jnp.float32(1), count=count, length=4)
    with pytest.raises(ValueError, match="a stacked batch needs an entry for each generation"):
        scan(jnp.arange(3.0), count=5, length=5, stacked=True)
    with pytest.raises(ValueError, match="next_batch makes all batches but the first, which batch must then be"):
        scan(jnp.arange(5.0), count=5, length=5, stacked=True, next_batch=next_batch)
    with pytest.raises(ValueError, match=r"'steps', which was not in record\.extra after generation 0"):
        eggroll.train(es, copy_state(state), jnp.float32(1), budget=("steps", 9.0), on_device=2, progress=False)
    mesh = jax.make_mesh((2,), ("population",), devices=jax.devices()[:2])
    with pytest.raises(ValueError, match="on_device needs whole generations on one device, but EvolutionStrategy has a mesh"):
        go_on(
            eggroll.EvolutionStrategy(fitness, population_size=8, sigma=0.1, optimizer=optax.sgd(0.1), mesh=mesh),
            state,
            on_device=2,
        )
    unknown = dataclasses.replace(es, fitness=None, aux=None)
    served = eggroll.External(unknown, lambda params, x: x, lambda outputs, known: 0.0)
    with pytest.raises(ValueError, match="External runs part of a generation on the host: leave it out"):
        go_on(served, state, on_device=2)
    with pytest.raises(ValueError, match="on_device needs batches of the same structure, shapes and dtypes in all generations"):
        go_on(es, copy_state(state), lambda generation: jnp.zeros(1 + 2 * generation), on_device=2)
    with pytest.raises(ValueError, match="next_batch must return a batch of the structure, shapes and dtypes of the one"):
        go_on(es, copy_state(state), jnp.float32(1), next_batch=lambda batch, metrics: jnp.ones(3), on_device=2)


def member_state(params, batch, key, memory):
    memory = 0.9 * memory + jnp.tanh(jnp.ones(4, params["w"].dtype) @ params["w"]).astype(jnp.float32)
    return -jnp.square(memory - batch).mean(), memory


def plain(params, batch, key):
    output = jnp.tanh(jnp.ones((1, 4), params["w"].dtype) @ params["w"] + params["b"])
    return -jnp.square(output.astype(jnp.float32) - batch).mean() + 0.01 * jax.random.normal(key)


def whole_numbers(params, batch, key):
    output = jax.lax.dot(jnp.ones((1, 4), jnp.int8), params["w"], preferred_element_type=jnp.int32)
    return -jnp.abs(output - 7).sum()


ES = functools.partial(eggroll.EvolutionStrategy, plain, population_size=32, sigma=0.1)
CASES = {
    "plateau": (ES(optimizer=optax.chain(optax.adam(0.01), optax.contrib.reduce_on_plateau(patience=1))), PARAMS, {}),
    "clipped": (ES(optimizer=optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.01)), noise_reuse=2), PARAMS, {}),
    "dense": (
        ES(optimizer=optax.sgd(0.1, momentum=0.9), perturbation=eggroll.Dense(), shaping="z_score", chunk_size=8),
        PARAMS,
        {},
    ),
    "flipout": (ES(optimizer=optax.lion(0.01), perturbation=eggroll.Flipout()), PARAMS, {}),
    "stochastic": (ES(optimizer=optax.adam(0.01), precision="stochastic"), HALF, {}),
    "master": (ES(optimizer=optax.sgd(0.01), perturbation=eggroll.LowRank(4, "normal")), HALF, {}),
    "member_state": (
        eggroll.EvolutionStrategy(member_state, population_size=16, sigma=0.1, optimizer=optax.sgd(0.1)),
        PARAMS,
        {"member_state": STATE},
    ),
    "integer": (
        eggroll.EvolutionStrategy(
            whole_numbers,
            population_size=16,
            sigma=None,
            shaping="z_score",
            optimizer=eggroll.threshold(0.3),
            perturbation=eggroll.Integer(),
        ),
        {"w": jnp.ones((4, 3), jnp.int8)},
        {},
    ),
    "zo": (zo.mezo(lambda params, batch, key: -plain(params, batch, key), learning_rate=0.01), PARAMS, {}),
}


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("name", CASES)
def test_every_strategy_has_the_same_bits(name, standard_promotion):
    es, params, options = CASES[name]
    batch = jnp.float32(0.5)
    runs = []
    for on_device in (1, 5):
        state = es.init(params, key=jax.random.key(1), **options)
        runs.append(eggroll.train(es, state, batch, generations=18, progress=False, on_device=on_device, keep_arrays=True))
    assert_same(runs[0][0], runs[1][0])
    for one, other in zip(runs[0][1], runs[1][1], strict=True):
        assert json.loads(one.to_json()) | dict.fromkeys(TIMES) == json.loads(other.to_json()) | dict.fromkeys(TIMES)
        assert_same((one.coefficients, one.checksums), (other.coefficients, other.checksums))


ENDLESS = """
import sys
from tests.eggroll.runs import test_on_device as run
from pathlib import Path
def report(state, record): print(record.generation, flush=True)
run.go(Path(sys.argv[1]), 100_000, on_device=run.K, callbacks=[report])
"""


@pytest.mark.slow
@pytest.mark.parametrize("scans", [1, 4])
def test_a_killed_process_loses_at_most_a_scan(tmp_path, scans):
    with subprocess.Popen([sys.executable, "-c", ENDLESS, str(tmp_path)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        reported = [int(child.stdout.readline()) for _ in range(scans)][-1]
        os.kill(child.pid, signal.SIGKILL)
    reached = len(list(Reader(tmp_path / "journal.bin")))
    assert reached >= reported
    end = reached + 2 * K
    resumed = go(tmp_path, end, on_device=K)
    assert resumed.history[0].generation == reached
    whole = go(tmp_path.with_name("whole"), end, on_device=1)
    assert_same(resumed.state, whole.state)
    assert_same_run(tmp_path, tmp_path.with_name("whole"))


@pytest.mark.slow
def test_the_page_is_true(standard_promotion, capsys):
    names: dict = {}
    for source in code_blocks("docs/on_device.md", "python"):
        exec(compile(source, "docs/on_device.md", "exec"), names)
    assert names["history"][-1].mean_fitness > -0.02 and names["metrics"].mean_fitness.shape == (8, 200)
    assert (names["metrics"].mean_fitness[:, -1] > -0.02).all()
