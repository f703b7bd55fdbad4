"""A state that `step` did not return is refused or carried, and a wrong replay is seen where it happens."""

import contextlib
import errno
import functools
import os
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll
from eggroll.journal import JournalError, Reader, Writer, replay
from eggroll.journal import __main__ as __main__
from eggroll.journal.checkpoint import Checkpoints
from eggroll.journal.repair import repair
from tests.tables import by_default

pytestmark = pytest.mark.usefixtures("standard_promotion")
RATE = "opt_state/hyperparams/learning_rate"
RECIPE = {"function": "tests.eggroll.journal.test_hand_changes:make", "options": {}}
TRUSTED = ("--import", "tests.eggroll.journal.test_hand_changes")


def fitness(params, batch, key):
    return -jnp.mean((batch @ params["w"] - 1) ** 2)


def batch_of(generation):
    return jax.random.normal(jax.random.key(generation), (6, 4))


@functools.cache  # one object: the strategies are equal, and compiled once
def optimizer(rate):
    return optax.inject_hyperparams(optax.adam)(learning_rate=rate)


def make(options=None):
    rate = (options or {}).get("rate", 0.1)
    es = eggroll.EvolutionStrategy(fitness, population_size=8, sigma=0.1, optimizer=optimizer(rate))
    state = es.init({"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}, key=jax.random.key(0))
    es.plan(state, batch_of(0))
    return es, state


def opened(folder, **options):
    es, initial = make()
    return es, contextlib.closing(eggroll.DurableRun(folder, es, initial, config={}, recipe=RECIPE, **options))


def go(folder, generations, change=None, adopted=True, **options):
    """Run generations, of which the first begins with a changed state; return the last state."""
    es, opening = opened(folder, **options)
    with opening as run:
        state = run.state
        if change is not None:
            state = change(state)
            if adopted:
                run.adopt(state)
        return eggroll.train(es, state, batch_of, generations=generations, durable=run, callbacks=[])[0]


def other_rate(state):
    """Halve the learning rate."""
    changed = state.opt_state.hyperparams | {"learning_rate": state.opt_state.hyperparams["learning_rate"] / 2}
    return state._replace(opt_state=state.opt_state._replace(hyperparams=changed))


def other_weights(state):
    return state._replace(params=state.params | {"w": 2 * state.params["w"]})


def other_key(state):
    return state._replace(key=jax.random.key(77))


CHANGES = {RATE: other_rate, "params/w": other_weights, "key": other_key}


def full_disk(*args, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def same(one, other):
    es, _ = make()
    return es.checksums(one) == es.checksums(other) and one.generation == other.generation


def state_on_disk(folder, **options):
    with opened(folder, **options)[1] as run:
        return run.state


@pytest.mark.parametrize("name", by_default(CHANGES, "params/w"))
def test_a_change_by_hand_is_refused_and_nothing_is_recorded(tmp_path, name):
    go(tmp_path, 2)
    with pytest.raises(JournalError, match=rf"by hand before generation 2: {name} are not .* to `adopt` of the DurableRun"):
        go(tmp_path, 1, CHANGES[name], adopted=False)
    assert len([*Reader(tmp_path / "journal.bin")]) == 2
    assert int(go(tmp_path, 1).generation) == 3


@pytest.mark.parametrize("name", by_default(CHANGES, RATE))
def test_an_adopted_change_is_carried_over_a_resume(tmp_path, name, capsys):
    go(tmp_path, 2, checkpoint_every=2)
    state = go(tmp_path, 2, CHANGES[name])  # the checkpoint of generation 2 is another one now
    assert same(state_on_disk(tmp_path), state)
    state = go(tmp_path, 1)
    assert [entry.sums.is_adopted for entry in Reader(tmp_path / "journal.bin")] == [False, False, True, False, False]
    es, initial = make()
    with pytest.raises(JournalError, match=rf"by hand before generation 2 \({name}\).*checkpoint of generation 2"):
        replay(es, initial, iter(Reader(tmp_path / "journal.bin")))
    __main__.main(["replay", str(tmp_path), *TRUSTED])
    assert f"begins at checkpoint 2\n{tmp_path}" in capsys.readouterr().out
    np.testing.assert_array_equal(np.load(tmp_path / "replayed-5.npz")["w"], state.params["w"])
    __main__.main(["inspect", str(tmp_path)])
    assert "changed by hand before generation 2\n" in capsys.readouterr().out


def test_a_run_that_ends_right_after_an_adoption_resumes_with_it_and_a_second_change_is_seen(tmp_path):
    go(tmp_path, 2)
    es, opening = opened(tmp_path)
    with opening as run:
        changed = other_rate(run.state)
        run.adopt(changed)
        with pytest.raises(ValueError, match="adopt needs the state that generation 2 begins with"):
            run.adopt(changed._replace(generation=jnp.int32(1)))
    with pytest.raises(JournalError, match=RATE):
        go(tmp_path, 1, other_rate, adopted=False)
    assert same(state_on_disk(tmp_path), changed)
    go(tmp_path, 1)
    assert [*Reader(tmp_path / "journal.bin")][2].sums.is_adopted


def test_an_adoption_that_cannot_be_written_leaves_the_run_as_it_was(tmp_path, monkeypatch):
    options = {"checkpoint_every": 2, "keep": 1}
    go(tmp_path, 2, **options)
    go(tmp_path, 2, other_rate, **options)
    states = tmp_path / "checkpoints" / "states"
    assert [path.name for path in states.iterdir()] == ["4"]
    es, opening = opened(tmp_path, **options)
    with opening as run, monkeypatch.context() as patch:
        patch.setattr(run.checkpoints._manager, "save", full_disk)
        with pytest.raises(OSError, match="a checkpoint cannot be written: No space left"):
            run.adopt(other_rate(run.state))
        patch.undo()
        assert not [*states.iterdir()]  # as a kill leaves it
        eggroll.train(es, run.state, batch_of, generations=1, durable=run, callbacks=[])
    assert "nothing was changed" in " ".join(repair(tmp_path / "journal.bin"))
    assert [path.name for path in states.iterdir()] == ["4"]
    assert int(state_on_disk(tmp_path, **options).generation) == 5
    assert [entry.sums.is_adopted for entry in Reader(tmp_path / "journal.bin")] == [False, False, True, False, False]


@pytest.mark.slow
def test_an_adopted_state_whose_checkpoint_is_lost_needs_repair(tmp_path):
    go(tmp_path, 2)
    go(tmp_path, 2, other_rate)
    shutil.rmtree(tmp_path / "checkpoints" / "states" / "2")
    with pytest.raises(JournalError, match=r"by hand before generation 2 .*eggroll\.journal repair RUN"):
        go(tmp_path, 1)
    assert "generations from 2 on cannot be rebuilt" in " ".join(repair(tmp_path / "journal.bin"))
    assert len([*Reader(tmp_path / "journal.bin")]) == 2 and int(go(tmp_path, 1).generation) == 3


def rewritten(path, change):
    """Write a journal again with other entries."""
    reader = Reader(path)
    header, entries = reader.header, [*reader]
    path.unlink()
    writer = Writer(path, header)
    for entry in entries:
        writer.append(change(entry))
    writer.close()


def test_a_wrong_replay_is_seen_at_the_generation_where_it_happens(tmp_path):
    go(tmp_path, 4)
    path = tmp_path / "journal.bin"
    rewritten(path, lambda e: e._replace(coefficients=e.coefficients * (1 + (e.generation == 2))))
    words = r"generation 2, replayed, gives other values than the run had: params/w, opt_state/.* differ.*accept_change=True"
    with pytest.raises(JournalError, match=words):
        go(tmp_path, 1)
    state = go(tmp_path, 1, accept_change=True)  # adopted at once
    assert same(state_on_disk(tmp_path), state)
    assert [entry.sums.is_adopted for entry in Reader(path)] == [False] * 4 + [True]
    es, other = make({"rate": 0.2})
    with pytest.raises(JournalError, match=f"the run began with another state: {RATE} differ"):
        replay(es, other, iter(Reader(path)))


def test_another_environment_is_compared_by_tolerance_and_says_so(tmp_path, capsys):
    go(tmp_path, 3, checkpoint_every=2)
    path = tmp_path / "journal.bin"
    rewritten(path, lambda e: e._replace(sums=e.sums._replace(after=e.sums.after + 1, before=None, environment=1)))
    with pytest.warns(UserWarning, match=r"generations 2 to 2 are replayed up to rounding.*\(cpu .*, eggroll \d"):
        state = go(tmp_path, 1, checkpoint_every=2)
    sums = [entry.sums for entry in Reader(path)]
    assert sums[3].before is not None and not sums[3].is_adopted and sums[3].environment != 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        __main__.main(["verify", str(tmp_path), *TRUSTED])
        assert "generation 4: equal\n2 checkpoints are rebuilt bit for bit" in capsys.readouterr().out
        with contextlib.closing(Checkpoints(tmp_path / "checkpoints", config={})) as checkpoints:
            near = state._replace(params=jax.tree.map(lambda x: x * (1 + 2**-20), state.params))
            checkpoints.save(near, replace=True)
        __main__.main(["verify", str(tmp_path), *TRUSTED])
        assert "generation 4: equal up to rounding, " in capsys.readouterr().out
        with contextlib.closing(Checkpoints(tmp_path / "checkpoints", config={})) as checkpoints:
            checkpoints.save(other_weights(state), replace=True)
        with pytest.raises(SystemExit, match=r"does not rebuild the checkpoints of generations \[4\]"):
            __main__.main(["verify", str(tmp_path), *TRUSTED])


def test_rounding_is_told_from_another_learning_rate():
    """Weights of 10 that move by 0.01: a step that is a tenth too long is far, in units of what they moved."""
    before, stored = {"w": np.full(9, 10, np.float32)}, {"w": np.full(9, 10.01, np.float32)}
    for replayed, expected in ((np.float32(10.01 * (1 + 2**-23)), True), (np.float32(10.011), False)):
        distance, is_near = __main__._compare_rounded(before, {"w": np.full(9, replayed)}, stored)
        assert is_near is expected and (distance > 0.05) is not expected
