"""One writer per run folder."""

import contextlib
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from eggroll.experiments.common.seeds import prepare_folder, run_seeds
from eggroll.journal import Reader, lock
from eggroll.journal.checkpoint import Checkpoints
from eggroll.journal.lock import RunInUse, RunLock, RunLost
from eggroll.runs.durable import DurableRun
from eggroll.runs.training import train
from tests.eggroll.journal.test_journal import batch_of, make

pytestmark = pytest.mark.usefixtures("standard_promotion")


def open_run(folder):
    es, initial = make()
    return es, DurableRun(folder, es, initial, config={}, checkpoint_every=2)


def go(es, run, state, generations):
    for _ in range(generations):
        state, metrics = es.step(state, batch_of(int(state.generation)))
        run.record(state, metrics)
    return state


def test_a_second_writer_is_refused_and_the_first_one_loses_nothing(tmp_path):
    es, first = open_run(tmp_path)
    state = go(es, first, first.state, 5)
    with pytest.raises(
        RunInUse, match=rf"{tmp_path} is in use by process {os.getpid()} on .* \(since 20.*\): end it, or choose"
    ):
        open_run(tmp_path)
    reader = Checkpoints(tmp_path / "checkpoints", config=None)  # readers need no lock, and disturb nobody
    assert reader.generations == [2, 4] or reader.generations == [2]
    reader.close()
    go(es, first, state, 3)
    first.close()
    assert [entry.generation for entry in Reader(tmp_path / "journal.bin")] == list(range(8))
    _, second = open_run(tmp_path)
    assert second.state.generation == 8
    second.close()


def test_a_refused_run_leaves_the_folder_free(tmp_path):
    es, first = open_run(tmp_path)
    first.close()
    with pytest.raises(ValueError, match="other settings"):
        DurableRun(tmp_path, es, make()[1], config={"a": 1})
    RunLock(tmp_path).release()


@pytest.mark.parametrize("what", ["moved", "deleted", "replaced"])
def test_a_folder_that_vanishes_stops_the_run(tmp_path, what):
    folder = tmp_path / "run"
    folder.mkdir()
    held = RunLock(folder)
    held.check()
    os.rename(folder, tmp_path / "elsewhere")
    if what == "deleted":
        os.unlink(tmp_path / "elsewhere" / lock.NAME)
    if what == "replaced":
        folder.mkdir()
        RunLock(folder).release()
    with pytest.raises(RunLost, match="taken over by another process" if what == "replaced" else "moved or deleted"):
        held.check()


@pytest.mark.parametrize("what", ["deleted", "replaced"])
def test_a_run_that_is_lost_writes_nothing_into_the_folder(tmp_path, what):
    folder = tmp_path / "run"
    es, run = open_run(folder)

    def batches(generation):
        if generation == 2:
            run.checkpoints.wait()
            os.rename(folder, tmp_path / "elsewhere")
            if what == "replaced":
                folder.mkdir()
                RunLock(folder).release()
        return batch_of(generation)

    with pytest.raises(RunLost):
        train(es, run.state, batches, generations=4, durable=run, run_folder=folder)
    run.close()
    assert len((tmp_path / "elsewhere/metrics.jsonl").read_text().splitlines()) == 2
    assert [path.name for path in folder.glob("*")] == ([lock.NAME] if what == "replaced" else [])


def test_a_figure_that_cannot_be_drawn_does_not_hide_what_ended_the_run(tmp_path, caplog):
    def fail(*arguments):
        raise KeyError("drawing") if isinstance(arguments[1], os.PathLike) else ArithmeticError("of the callback")

    es, initial = make()
    with pytest.raises(ArithmeticError, match="of the callback"):
        train(es, initial, batch_of, generations=1, callbacks=[fail], run_folder=tmp_path, plot=fail)
    assert "the figure was not drawn: 'drawing'" in caplog.text


def test_without_locks_the_later_writer_wins_and_the_earlier_one_is_told(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(lock.errno.ENOLCK, "no locks")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="has no locks: do not start a second process"):
        first = RunLock(tmp_path)
    first.check()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        second = RunLock(tmp_path)
    second.check()
    with pytest.raises(RunLost, match=rf"was taken over by process {os.getpid()} on"):
        first.check()


def test_a_lock_ends_with_its_process_and_not_with_what_it_started(tmp_path):
    """A forked child, and a program that was started, outlive the holder without the lock."""
    script = f"""
        import os, subprocess, sys, time
        from pathlib import Path
        from eggroll.journal.lock import RunLock
        lock = RunLock(Path({str(tmp_path)!r}))
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        other = subprocess.Popen(["sleep", "60"], close_fds=False)
        Path({str(tmp_path / "pids")!r}).write_text(f"{{child}} {{other.pid}}")
        os.kill(os.getpid(), 9)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], stderr=subprocess.DEVNULL, timeout=60)
    pids = [int(word) for word in (tmp_path / "pids").read_text().split()]
    try:
        assert len(pids) == 2 and all(os.path.exists(f"/proc/{pid}") for pid in pids)
        RunLock(tmp_path).release()
    finally:
        for pid in pids:
            os.kill(pid, 9)


def test_a_command_does_not_clear_the_folder_of_a_live_run(tmp_path):
    held = RunLock(tmp_path)
    (tmp_path / "journal.bin").write_bytes(b"of the live run")
    with pytest.raises(RunInUse), prepare_folder(tmp_path, resume=False):
        pass
    assert (tmp_path / "journal.bin").exists()
    held.release()
    with prepare_folder(tmp_path, resume=False):
        assert not (tmp_path / "journal.bin").exists()


def run_one(folder, train, *, resume=False):
    config = SimpleNamespace(folder=folder, seed=0, seeds=1, resume=resume)
    return run_seeds(config, train, experiment="rl", default="run", options={})


def test_a_command_keeps_others_out_until_its_summary_is_written(tmp_path):
    def start_another():
        for resume in (False, True):
            with pytest.raises(RunInUse, match="is in use by process"), prepare_folder(tmp_path, resume=resume):
                pass

    def train(run):
        for name in ("best", "best.old"):
            (tmp_path / name).mkdir()
        start_another()
        es, initial = make()
        with contextlib.closing(DurableRun(tmp_path, es, initial, config={}, lock=run.lock)) as durable:
            start_another()
            go(es, durable, durable.state, 1)
        start_another()
        assert (tmp_path / "best").exists() and len(list(Reader(tmp_path / "journal.bin"))) == 1
        return {"score": 1.0}

    assert run_one(tmp_path, train)["score"] == 1
    with prepare_folder(tmp_path, resume=False):
        assert {path.name for path in tmp_path.iterdir()} == {lock.NAME, "log.txt"}


def test_a_command_stays_in_its_folders_when_the_working_folder_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()

    def train(run):
        os.chdir(tmp_path / "elsewhere")
        run.lock.check()
        return {"score": 1.0}

    config = SimpleNamespace(folder=Path("a/run"), seed=0, seeds=2, resume=False)
    run_seeds(config, train, experiment="rl", default="run", options={})
    assert [(tmp_path / f"a/run/seed-{seed}/summary.json").exists() for seed in range(2)] == [True, True]
    os.chdir(tmp_path)
    held = RunLock(Path("a/run"))
    os.chdir(tmp_path / "elsewhere")
    held.check()


def test_a_command_that_was_taken_over_does_not_mark_the_run_as_finished(tmp_path):
    def train(run):
        os.unlink(tmp_path / lock.NAME)
        RunLock(tmp_path).release()
        return {}

    with pytest.raises(RunLost, match="taken over"):
        run_one(tmp_path, train)
    assert not (tmp_path / "summary.json").exists()


def test_a_finished_run_that_is_resumed_and_interrupted_stays_finished(tmp_path):
    def train(run):
        es, initial = make()
        with contextlib.closing(DurableRun(tmp_path, es, initial, config={}, lock=run.lock)) as durable:
            go(es, durable, durable.state, 1 - int(durable.state.generation))
        return {"score": 1.0}

    def train_and_stop(run):
        train(run)
        raise KeyboardInterrupt

    def continue_and_stop(run):
        with open(tmp_path / "journal.bin", "ab") as file:
            file.write(b"a generation")
        raise KeyboardInterrupt

    run_one(tmp_path, train)
    mark, journal = ((tmp_path / name).read_bytes() for name in ("summary.json", "journal.bin"))
    with pytest.raises(KeyboardInterrupt):
        run_one(tmp_path, train_and_stop, resume=True)
    assert (tmp_path / "summary.json").read_bytes() == mark and (tmp_path / "journal.bin").read_bytes() == journal
    with pytest.raises(KeyboardInterrupt):
        run_one(tmp_path, continue_and_stop, resume=True)
    assert not (tmp_path / "summary.json").exists()
