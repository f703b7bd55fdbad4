"""Runs of `experiments.reason` that are stopped: killed within a generation, by Ctrl-C, with files cut off or lost."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from eggroll.experiments.common.run import INTERRUPTED, leave
from eggroll.experiments.reason import __main__ as reason
from eggroll.experiments.reason.evolution import Evolution
from eggroll.experiments.reason.progress import Progress
from eggroll.journal import Reader
from eggroll.journal.fingerprint import fingerprint
from eggroll.llm import hf
from tests.experiments.reason.reason_runs import IN_GENERATION_2, TINY, Ending, letters

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.usefixtures("standard_promotion")
CLOCK = {"seconds", "seconds_spent", "check_seconds", "tokens_per_second", "members_per_second", "crc32"}
OTHER = {*CLOCK, "training_seconds", "peak_mib", "limits", "file_sha256"}  # of the summary, of the clock or of the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("stops")


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys.modules["eggroll.envs.tasks.arithmetic"], "answer_matches", letters)


def options(name, *more):
    return ["--generations", "5", "--folder", f"out/{name}", *more]


def run(capsys, name, *more):
    reason.main([*TINY, *options(name, *more)])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def metrics(name):
    lines = [json.loads(line) for line in Path(f"out/{name}/metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]


def coefficients(name):
    return [entry.coefficients.tolist() for entry in Reader(Path(f"out/{name}/journal.bin"))]


@pytest.fixture
def whole(capsys):
    """Compare a run with one that nothing disturbed."""
    if not Path("out/whole/summary.json").exists():
        run(capsys, "whole")

    def compare(name, *, first=0):
        """The same journal, weights and numbers; metrics from generation `first` on."""
        assert coefficients(name) == coefficients("whole")
        one, other = (jax.tree.leaves(hf.load(Path(f"out/{run}/model"))[2]) for run in ("whole", name))
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)
        assert metrics(name)[-6 + first :] == metrics("whole")[first:]  # five generations and the last check
        summaries = (json.loads(Path(f"out/{run}/summary.json").read_text()) for run in ("whole", name))
        one, other = ({key: value for key, value in row.items() if key not in OTHER} for row in summaries)
        assert one == other

    return compare


def killed(name, moment, *more):
    """Run in a process that ends itself by SIGKILL."""
    command = [sys.executable, "-m", "tests.experiments.reason.reason_runs", moment, *options(name, *more)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.slow
def test_a_run_that_is_killed_twice_ends_like_one_that_is_not(capsys, whole):
    killed("killed", "checkpoint")  # of generation 2, which is in the journal
    assert len(metrics("killed")) == len(coefficients("killed")) == 2
    killed("killed", "score", "--resume")  # two checks before training, then calls of generations 2, 3, and 4 in the middle
    assert len(metrics("killed")) == len(coefficients("killed")) == 4
    run(capsys, "killed", "--resume")
    whole("killed")


@pytest.fixture
def interruptible():
    """Take SIGINT as Python does by default: what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_ctrl_c_is_refused_by_a_clear_error_and_leaves_a_run_that_goes_on(capsys, whole, monkeypatch, interruptible):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        ending = Ending(IN_GENERATION_2, lambda: os.kill(os.getpid(), signal.SIGINT))
        patch.setattr(sys.modules["eggroll.envs.tasks.arithmetic"], "answer_matches", ending)
        run(capsys, "stopped")
    told = capsys.readouterr().err.splitlines()
    assert stopped.value.code == INTERRUPTED and told[-1] == reason.STOPPED["eggroll"]
    assert Path("out/stopped/log.txt").read_text().splitlines()[-1].endswith("ended by KeyboardInterrupt")
    assert len(coefficients("stopped")) == 2 and not Path("out/stopped/summary.json").exists()
    run(capsys, "stopped", "--resume")
    whole("stopped")


def test_an_interrupted_command_ends_before_the_interpreter_does(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    leave(lambda: sys.exit(INTERRUPTED))
    with pytest.raises(SystemExit, match="error"):
        leave(lambda: sys.exit("error"))
    assert ended == [INTERRUPTED]


def cut(path, count):
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - count)


@pytest.mark.slow
def test_last_lines_that_were_cut_off_are_done_again(capsys, whole, caplog):
    out = Path("out/cut")
    shutil.copytree("out/whole", out)
    for path, count in ((out / "journal.bin", 3), (out / "metrics.jsonl", 40)):
        cut(path, count)
    run(capsys, "cut", "--resume")
    assert "the last record, of generation 4, is incomplete and was dropped" in caplog.text
    whole("cut")


@pytest.mark.slow
def test_a_checkpoint_that_a_kill_lost_is_rebuilt_where_it_is_the_best(capsys, whole):
    shutil.copytree("out/whole", "out/lost")
    for path in Path("out/lost/checkpoints/states").iterdir():
        shutil.rmtree(path)
    summary = run(capsys, "lost", "--resume", "--generations", "3")  # more are done: only the export is left
    assert summary["generations"] == 5
    whole("lost")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # tasks that orbax abandons on damaged files
def test_the_best_parameters_are_rebuilt_over_a_damaged_checkpoint(capsys, whole, monkeypatch, caplog):
    """Those of generation 2, whose checkpoint is not the one that the run continues from."""
    states = {}

    def rebuild_the_second(self, best, *given, **options):
        states[name] = self._rebuild(2, *given, **options)
        return states[name].params

    monkeypatch.setattr(Evolution, "_best", rebuild_the_second)
    monkeypatch.setattr(Progress, "finish", lambda self, *_: setattr(self, "best_generation", 2))  # never the last one
    for name in ("sound", "damaged"):
        shutil.copytree("out/whole", f"out/{name}")
        if name == "damaged":
            Path("out/damaged/checkpoints/states/2/state/manifest.ocdbt").write_bytes(b"")
        run(capsys, name, "--resume", "--generations", "3")
    assert fingerprint(states["sound"].params) == fingerprint(states["damaged"].params)
    assert "the checkpoint of generation 2" in caplog.text and "an earlier one is used" in caplog.text
    gc.collect()
