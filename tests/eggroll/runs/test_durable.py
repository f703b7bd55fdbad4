"""A durable run with member state, whose generations are evaluated again; with what is carried; with wrong states."""

import contextlib
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll
from eggroll.journal import JournalError
from eggroll.runs.carried import pack, unpack

PARAMS = {"w": 0.3 * jnp.ones((4, 4)), "b": jnp.zeros(4)}


def recurrent(params, batch, key, memory):
    memory = jnp.tanh(memory + batch @ params["w"]) + params["b"]
    return jnp.where(batch[0] > 1e3, jnp.nan, memory.sum()), memory


def batch_of(generation, *, other=False):
    batch = jax.random.normal(jax.random.key(generation + 100 * other), (4,))
    return batch.at[0].set(2e3) if generation == 4 else batch  # in which no member is valid


def go(folder, generations, **options):
    """Resume training in a folder, with a checkpoint every three generations."""
    es = eggroll.EvolutionStrategy(recurrent, population_size=8, sigma=0.1, optimizer=optax.sgd(0.1), shaping="z_score")
    initial = es.init(PARAMS, key=jax.random.key(0), member_state=jnp.zeros(4))
    es.plan(initial, batch_of(0))
    run = eggroll.DurableRun(folder, es, initial, config={}, checkpoint_every=3)
    start, left = int(run.state.generation), generations - int(run.state.generation)
    state = run.state
    try:
        if left:
            batches = lambda generation: batch_of(generation, **options)  # noqa: E731
            state, _ = eggroll.train(es, state, batches, generations=left, run_folder=folder, durable=run)
    finally:
        run.close()
    return start, state


@pytest.mark.filterwarnings("ignore:generation 4 was skipped")
def test_a_run_with_member_state_resumes_bit_for_bit_even_over_a_generation_without_valid_members(tmp_path):
    _, whole = go(tmp_path / "whole", 8)
    go(tmp_path / "parts", 5)
    start, resumed = go(tmp_path / "parts", 8)
    assert start == 3  # the last checkpoint; generations 3 and 4 are evaluated once more
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        if not jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(one, other)


@pytest.mark.filterwarnings("ignore:generation 4 was skipped")
def test_generations_with_other_coefficients_than_the_journal_are_an_error(tmp_path):
    go(tmp_path, 5)
    with pytest.raises(JournalError, match="generation 3, evaluated again, gave other coefficients than"):
        go(tmp_path, 8, other=True)


def linear(params, batch, key):
    return (params["w"] @ batch).sum() + params["b"].sum()


@pytest.mark.parametrize(
    ("fitness", "more", "words"),
    [
        (linear, {}, "TypeError"),
        (linear, {"members_per_batch": 2}, "ValueError: members_per"),
        (None, {}, "ValueError: fitness"),
    ],
)
def test_a_run_without_the_plan_says_how_to_make_it(fitness, more, words, tmp_path):
    es = eggroll.EvolutionStrategy(fitness, population_size=6, sigma=0.1, optimizer=optax.sgd(0.1), **more)
    with pytest.raises(ValueError, match=rf"call plan\(state, batch\) before it \(without a batch there is {words}"):
        eggroll.DurableRun(tmp_path, es, es.init(PARAMS, key=jax.random.key(0)), config={})


class Counter:
    """Carries an array that it changes in place."""

    def __init__(self):
        self.counts = np.zeros(2)

    def __call__(self, state, record):
        self.counts += 1

    def save(self):
        return self.counts

    def load(self, saved):
        self.counts = saved


def test_a_wrong_state_is_refused_before_a_file_is_touched(tmp_path, monkeypatch):
    """And a callback may change the working folder, and what is carried may be changed in place after a resume."""
    es = eggroll.EvolutionStrategy(linear, population_size=8, sigma=0.1, optimizer=optax.sgd(0.1))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()

    def start():
        state = es.init(PARAMS, key=jax.random.key(0))
        es.plan(state, jnp.ones(4))
        return state

    def run(state=None, *callbacks):
        counter = Counter()
        opened = eggroll.DurableRun("run", es, start(), config={}, carried=counter, checkpoint_every=2)
        with contextlib.closing(opened):
            state = opened.state if state is None else state
            calls = [*callbacks, counter]
            eggroll.train(es, state, jnp.ones(4), generations=3, run_folder="run", durable=opened, callbacks=calls)
        return counter.counts

    assert run(None, lambda *_: os.chdir(tmp_path / "elsewhere")).tolist() == [3, 3]
    os.chdir(tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "run").glob("*.*") if path.name != "run.lock"}
    with pytest.raises(ValueError, match=r"state is of generation 0, and the run in .* continues at generation 3"):
        run(start())
    with pytest.raises(JournalError, match="changed by hand before generation 3"):
        run(start()._replace(generation=jnp.int32(3)))
    assert before == {path: path.read_bytes() for path in before}
    assert run().tolist() == [6, 6]


def test_carried_arrays_and_keys_are_packed_to_bytes_and_back():
    carried = {"counts": np.arange(3), "key": jax.random.key(7), "half": jnp.ones(2, jnp.bfloat16), "none": np.zeros((0, 2))}
    restored = unpack(pack(carried), carried)
    assert restored["key"] == carried["key"] and restored["none"].shape == (0, 2)
    restored["counts"] += 1
    assert restored["counts"].tolist() == [1, 2, 3] and restored["half"].tolist() == [1, 1]
    for size in (8, 32):
        with pytest.raises(JournalError, match=f"the journal carries {size} bytes a generation, this run 24"):
            unpack(bytes(size), carried["counts"])
