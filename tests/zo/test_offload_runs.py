"""Offloaded runs have the journal, the checkpoints, the resume and the metrics of all others, bit for bit."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll
from eggroll import zo
from eggroll.journal import JournalError
from eggroll.journal import __main__ as command
from eggroll.journal.fingerprint import fingerprint
from tests.tables import slow
from tests.zo.tiny_blocks import BATCH, PIECES, init

RECIPE = {"function": "tests.zo.test_offload_runs:make", "options": {"second_moment": 0.9, "transfer_dtype": "bfloat16"}}
FIXED = {"precision": "master", "sigma": 1e-2}


def make(options, *, offload=True):
    """Strategy with its plan, and initial state: the recipe of the journal."""
    rate = optax.linear_schedule(1e-3, 3e-2, 10)
    own = zo.mezo(PIECES, learning_rate=rate, sigma=1e-2, directions=2, second_moment=options["second_moment"])
    es = zo.Offload(own, transfer_dtype=options["transfer_dtype"]) if offload else own
    return es, es.init(init(), key=jax.random.key(9), batch=BATCH)


def batch_of(step):
    return jnp.roll(BATCH, step, axis=0) if step != 3 else jnp.zeros_like(BATCH)  # whose loss is 0 / 0: skipped


class Mean:
    """Carried with the state."""

    def __init__(self):
        self.value = np.zeros(1, np.float32)

    def save(self):
        return self.value

    def load(self, saved):
        self.value = np.asarray(saved)


def go(folder, steps, *, interrupt=None, offload=True, config=None):
    """Resume training in a folder, up to `steps` or to an interrupt before step `interrupt` is recorded."""
    es, initial = make(RECIPE["options"], offload=offload)
    mean = Mean()
    options = dict(carried=mean, checkpoint_every=3, recipe=RECIPE)

    def callback(state, record):
        if record.generation == interrupt:
            raise KeyboardInterrupt
        mean.value = np.float32(0.9) * mean.value + np.float32(0 if record.skipped else record.mean_fitness)

    with contextlib.closing(eggroll.DurableRun(folder, es, initial, config=config or {}, **options)) as run:
        state, start = run.state, int(run.state.generation)
        with contextlib.suppress(KeyboardInterrupt):
            state, _ = eggroll.train(
                es, state, batch_of, generations=steps - start, callbacks=[callback], run_folder=folder, durable=run
            )
    return es, state, start, mean


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in row if name not in ("seconds", "members_per_second", "crc32")} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder, strategy, state and carried mean of an uninterrupted run of eight steps."""
    folder = tmp_path_factory.mktemp("offload") / "whole"
    with pytest.warns(UserWarning, match="generation 3 was skipped"):
        es, state, _, mean = go(folder, 8)
    return folder, es, state, mean


@pytest.mark.filterwarnings("ignore:generation 3 was skipped")
@pytest.mark.parametrize("interrupt", [slow(1), slow(3), 5])  # without a checkpoint, right after one, between two
def test_an_interrupted_run_resumes_bit_for_bit(whole, tmp_path, interrupt):
    folder, _, expected, mean = whole
    go(tmp_path, 8, interrupt=interrupt)
    _, state, start, again = go(tmp_path, 8)
    assert start == interrupt
    assert fingerprint(state) == fingerprint(expected) and again.value == mean.value
    assert metrics(tmp_path) == metrics(folder)
    assert (tmp_path / "journal.bin").read_bytes() == (folder / "journal.bin").read_bytes()


@pytest.mark.parametrize("steps", [slow(6), 8])
def test_the_journal_rebuilds_parameters_and_checkpoints_bit_for_bit(whole, capsys, steps, tmp_path):
    folder, es, state, _ = whole
    command.main(["verify", str(folder), "--trust"])
    assert "2 checkpoints are rebuilt bit for bit" in capsys.readouterr().out
    command.main(["replay", str(folder), "--generation", str(steps), "--out", str(tmp_path / "out.npz"), "--trust"])
    with np.load(tmp_path / "out.npz") as arrays:
        replayed = {name: arrays[name] for name in arrays}
    expected = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(es.parameters(state))
    }
    assert replayed.keys() == expected.keys()
    same = {name: replayed[name].tobytes() == expected[name].tobytes() for name in expected}
    assert all(same.values()) if steps == 8 else not any(same.values())  # the parameters of step 6 are others


def test_verify_detects_a_checkpoint_that_differs_from_the_journal(whole, tmp_path, capsys):
    """The negative control of `verify`: a journal whose last coefficients are others."""
    folder, es, _, _ = whole
    reader = eggroll.journal.Reader(folder / "journal.bin")
    run = eggroll.DurableRun(tmp_path, *make(RECIPE["options"]), config={}, checkpoint_every=3, recipe=RECIPE)
    state = run.state
    for entry in reader:
        state = es.replay(state, entry.coefficients)
        factor = -1 if entry.generation == 5 else 1  # the update that is pending in the checkpoint of generation 6
        run._journal.append(entry._replace(coefficients=factor * entry.coefficients, extra=b"", sums=None))
        if entry.generation % 3 == 2:
            run.checkpoints.save(state)
    run.close()
    with pytest.raises(SystemExit, match=r"does not rebuild the checkpoints of generations \[6\]"):
        command.main(["verify", str(tmp_path), "--trust"])
    assert "generation 3: equal" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:generation 3 was skipped")
def test_metrics_have_the_fields_of_a_resident_run(whole, tmp_path):
    _, resident, _, _ = go(tmp_path, 4, offload=False)
    here, away = metrics(tmp_path), metrics(whole[0])
    assert here[0].keys() == away[0].keys()
    unknown = [name for name, value in away[0].items() if value is None]
    assert (
        unknown == ["gradient_norm", "moved", "update_over_sigma", "update_over_weights", "weight_norm"]
        and away[0]["leaf_norms"] == {}
    )
    for name in ("sigma", "invalid", "skipped", "generation"):
        assert [row[name] for row in here] == [row[name] for row in away[:4]]
    assert here[0]["mean_fitness"] == pytest.approx(away[0]["mean_fitness"], rel=1e-2)  # blocks are rounded to bfloat16


def test_a_resident_and_an_offloaded_run_are_not_mixed(whole):
    with pytest.raises(JournalError, match="config precision is 'offloaded as bfloat16', not 'master'"):
        go(whole[0], 9, offload=False)
    with pytest.raises(ValueError, match="other settings: a"):
        go(whole[0], 9, config={"a": 1})
