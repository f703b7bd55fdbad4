"""A run is not resumed as another run: the journal knows the functions of its run by their digests."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll
from eggroll.digests import digest
from eggroll.journal import JournalError, Reader, make_header, replay
from eggroll.journal.repair import repair
from eggroll.runs.durable import DurableRun

pytestmark = pytest.mark.usefixtures("standard_promotion")
SCALES = np.ones(3, np.float32)
SGD = optax.sgd(0.1)  # one object: strategies that are made again are equal, and compiled once


def fitness(params, batch, key):
    return -jnp.sum((params["w"] * SCALES - batch) ** 2)


def same_but_renamed(parameters, batch, key):
    return -jnp.sum((parameters["w"] * SCALES - batch) ** 2)


def go(folder, fitness=fitness, optimizer=None, generations=2, batch=1.0, sigma=0.1, shaping="centered_ranks", **options):
    settings = {"population_size": 4, "sigma": sigma, "shaping": shaping, "optimizer": optimizer or SGD}
    es = eggroll.EvolutionStrategy(fitness, **settings)
    initial = es.init({"w": jnp.zeros(3)}, key=jax.random.key(0))
    es.plan(initial, jnp.float32(batch))
    run = DurableRun(folder, es, initial, config={}, **options)
    state = run.state
    for _ in range(generations):
        state, metrics = es.step(state, jnp.float32(batch))
        run.record(state, metrics)
    run.close()
    return int(state.generation)


CHANGES = {  # what a run is resumed with: what is no longer the same
    "a negated fitness": ({"fitness": lambda p, b, k: -fitness(p, b, k)}, "the fitness is"),
    "another constant": ({"fitness": lambda p, b, k: -jnp.sum((p["w"] * (2 * SCALES) - b) ** 2)}, "the fitness is"),
    "another rate": ({"optimizer": optax.sgd(0.2)}, "the optimizer is"),
    "a clipped gradient": ({"optimizer": optax.chain(optax.clip(1.0), optax.sgd(0.1))}, "the optimizer is"),
    "both": ({"fitness": lambda p, b, k: p["w"].sum(), "optimizer": optax.sgd(1.0)}, "the fitness and the optimizer are"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_run_that_resumes_as_another_run_is_refused(tmp_path, what):
    changed, said = CHANGES[what]
    go(tmp_path)
    before = (tmp_path / "journal.bin").read_bytes()
    with pytest.raises(JournalError, match=f"{said} not the same as when the journal was last written.*--accept-change"):
        go(tmp_path, **changed)
    assert (tmp_path / "journal.bin").read_bytes() == before
    assert go(tmp_path, fitness=same_but_renamed) == 4


def columns(params, batch, key):
    return fitness(params, batch, key) * jnp.ones(3)


FUNCTIONS = {  # a setting that is a function, and what it is changed to
    "schedule of sigma": {"sigma": [optax.exponential_decay(0.1, 1, decay) for decay in (0.9, 0.5)]},
    "shaping": {"shaping": [lambda f: f - f.mean(), lambda f: 100 * (f - f.mean())], "fitness": [fitness] * 2},
    "weights of the shaping": {"shaping": [lambda f: f @ jnp.ones(3), lambda f: f @ jnp.arange(3.0)], "fitness": [columns] * 2},
}


@pytest.mark.parametrize("what", FUNCTIONS)
def test_a_changed_schedule_or_shaping_is_refused_or_accepted(tmp_path, what):
    run, changed = ({name: pair[index] for name, pair in FUNCTIONS[what].items()} for index in (0, 1))
    go(tmp_path, **run)
    with pytest.raises(JournalError, match=f"the {what.split(' of the ')[-1]} is not the same as when .*--accept-change"):
        go(tmp_path, **changed)
    assert go(tmp_path, generations=1, **run) == 3
    assert go(tmp_path, accept_change=True, **changed) == 5
    assert go(tmp_path, generations=1, **changed) == 6
    with pytest.raises(JournalError, match="is not the same"):
        go(tmp_path, **run)


def test_a_replay_takes_sigma_from_the_journal(tmp_path):
    run, changed = FUNCTIONS["schedule of sigma"]["sigma"]
    go(tmp_path, sigma=run)
    go(tmp_path, sigma=changed, accept_change=True)
    sigmas = [entry.sigma for entry in Reader(tmp_path / "journal.bin")]
    np.testing.assert_allclose(sigmas, [0.1, 0.09, 0.025, 0.0125], rtol=1e-6)
    for sigma in (run, changed):
        es = eggroll.EvolutionStrategy(fitness, population_size=4, sigma=sigma, optimizer=SGD)
        state = es.init({"w": jnp.zeros(3)}, key=jax.random.key(0))
        es.plan(state, jnp.float32(1))
        state = replay(es, state, iter(Reader(tmp_path / "journal.bin")))  # compared with the checksums of the run
        np.testing.assert_allclose(state.sigma, sigma(4), rtol=1e-6)


def test_a_function_with_a_digest_may_have_another_name_and_one_without_may_not():
    def schedule(name, *digests):
        now, _ = headers()
        return dataclasses.replace(now, config=now.config | {"sigma": f"function {name}"}, digests=[*now.digests[:2], *digests])

    schedule("cosine", "0", "").check(schedule("warm", "0", ""))
    schedule("cosine", "0", "").check(schedule("warm", "1", ""), accept_change=True)
    schedule("cosine", "0", "").continued_by(schedule("warm", "1", ""), accept_change=True).check(schedule("warm", "1", ""))
    schedule("cosine").check(schedule("cosine", "0", ""))  # written before there were such digests
    with pytest.raises(JournalError, match="config sigma is 'function cosine', not 'function warm'"):
        schedule("cosine").check(schedule("warm", "0", ""))


def test_an_accepted_change_is_the_new_state_of_affairs(tmp_path):
    go(tmp_path)
    optimizer = optax.adam(0.1)  # its state differs too: nothing is replayed from a checkpoint of the former
    changed = {"fitness": lambda p, b, k: p["w"].sum(), "optimizer": optax.sgd(0.2)}
    assert go(tmp_path, accept_change=True, **changed) == 4
    assert go(tmp_path, **changed) == 6
    with pytest.raises(JournalError, match="the fitness and the optimizer are not the same"):
        go(tmp_path, optimizer=optimizer)
    assert [entry.generation for entry in Reader(tmp_path / "journal.bin")] == list(range(6))


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1, momentum=0.9), optax.sgd(0.1), optax.adam(0.1, mu_dtype=jnp.bfloat16)])
def test_a_checkpoint_of_another_optimizer_is_refused_and_stays_where_it_is(tmp_path, optimizer):
    go(tmp_path, optimizer=optax.adam(0.1), generations=3, checkpoint_every=2)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "run.lock"}
    with pytest.raises(ValueError, match=r"generation 2 .* is of another model or optimizer"):
        go(tmp_path, optimizer=optimizer, checkpoint_every=2, accept_change=True)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "run.lock"}
    assert go(tmp_path, optimizer=optax.adam(0.1)) == 5


def test_a_damaged_header_does_not_switch_the_check_off(tmp_path):
    path, copy = tmp_path / "journal.bin", tmp_path / "journal.header.json"
    go(tmp_path, checkpoint_every=2)
    header, length = Reader(path).header, Reader(path)._first

    def damage():
        path.write_bytes(b"garbage" * 8 + path.read_bytes()[56:])

    damage()
    with pytest.raises(JournalError, match="the optimizer is not the same"):
        go(tmp_path, optimizer=optax.sgd(0.2))
    repair(path)
    assert Reader(path).header == header and Reader(path)._first == length
    damage()
    assert go(tmp_path) == 4 and Reader(path).header == header
    damage()
    copy.write_text("{}")
    for _ in range(2):
        with pytest.raises(JournalError, match="and its copy are damaged or missing"):
            go(tmp_path)
        repair(path)
    assert go(tmp_path, accept_change=True) == 6
    damage()
    assert go(tmp_path) == 8 and [entry.generation for entry in Reader(path)] == list(range(8))
    copy.unlink()
    go(tmp_path)
    assert copy.exists()


def headers(**changes):
    es = eggroll.EvolutionStrategy(fitness, population_size=4, sigma=0.1, optimizer=SGD)
    state = es.init({"w": jnp.zeros(3)}, key=jax.random.key(0))
    es.plan(state, jnp.float32(1))
    header = make_header(es, state)
    return header, dataclasses.replace(header, **changes)


def test_another_jax_warns_and_older_journals_have_no_digests():
    now, then = headers(digests=["0", "0"], versions={"jax": "0.1"})
    with pytest.warns(UserWarning, match="whether the fitness and the optimizer are the same as before is not known: jax 0.1"):
        then.check(now)
    now, then = headers(digests=None)
    then.check(now)


def test_a_replay_needs_the_optimizer_and_no_fitness():
    now, then = headers()
    dataclasses.replace(then, digests=["0", then.digests[1]]).check(now, replay=True)
    with pytest.raises(JournalError, match="the optimizer is not the same"):
        dataclasses.replace(then, digests=[then.digests[0], "0"]).check(now, replay=True)


def model(params, x, key):
    def layer(x, w):
        return jax.nn.gelu(jnp.tanh(x @ w)) + jax.random.normal(key, x.shape), None

    @jax.custom_jvp
    def own(x):
        return jnp.sin(x)

    own.defjvp(lambda primals, tangents: (own(*primals), tangents[0]))
    return own(jax.checkpoint(lambda x: jax.lax.scan(layer, x, params)[0])(x)).sum() * SCALES[0]


def digest_of_model():
    return digest(model, jnp.ones((2, 3, 3)), jnp.ones((4, 3)), jax.random.key(0))


def test_what_a_digest_cannot_tell_is_not_compared():
    host = lambda x: x  # noqa: E731
    unknown = digest(lambda x: jax.pure_callback(host, x, x), jnp.ones(3))
    now, then = headers()
    assert unknown == ""
    dataclasses.replace(then, digests=["", then.digests[1]]).check(now)


@pytest.mark.slow
def test_digests_are_the_same_in_every_process():
    command = "from tests.eggroll.journal.test_changes import digest_of_model; print(digest_of_model())"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    found = {
        subprocess.run(
            [sys.executable, "-c", command],
            env=environment | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()[-1]
        for seed in ("1", "2")
    }
    assert found == {digest_of_model()}
