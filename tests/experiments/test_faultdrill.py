"""The fault drill: the whole of it by night, by day its parts in small, and that each of them notices what must not happen."""

import gc
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from eggroll.envs.tasks.scores import Scores
from eggroll.experiments.faultdrill import kills, storage, survivors, workers

# Of tasks that orbax abandons on damaged files, until they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_thousand_faults_cost_nothing(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "eggroll.experiments.faultdrill", "--folder", str(tmp_path / "drill")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["faults"] >= 1000 and summary["bit_equal"] and summary["ended"]
    assert not any(summary[name] for name in ("silent", "lost_generations", "unresumable", "hung", "leaked"))
    assert all(summary["kills_in"].values()) and all(summary["job_kills_in"].values())
    assert all(count >= 200 for name, count in summary["storage_faults"].items() if name != storage.RESULTS)
    assert summary["refused"] >= 1 and summary["storage"]["pair"]["recovered"] >= 1


def test_a_training_that_fails_ends_the_drill_with_its_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    drill = kills.Drill(dict.fromkeys(kills.MOMENTS, 0))
    with pytest.raises(RuntimeError, match="the training exited with 1"):
        drill.start(tmp_path, 10, 5)


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    with jax.numpy_dtype_promotion("standard"):
        yield storage.make_subject("net", tmp_path_factory.mktemp("storage"))
    gc.collect()


def damaged(subject, place, *faults):
    copy = shutil.copytree(subject.folder, place)
    assert all([storage.inflict(copy / name, kind, random.Random(1)) for name, kind in faults])
    return copy


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("journal.bin", "flip", "recovered"),
        ("journal.bin", "garbage", "recovered"),
        ("journal.bin", "delete", "recovered"),
        ("metrics.jsonl", "garbage", "recovered"),
        ("checkpoints/config.json", "truncate", "recovered"),
        ("checkpoints/states/12/metrics/metrics", "delete", "recovered"),
        ("checkpoints/states/12/state/array_metadatas/process_0", "truncate", "recovered"),  # was refused as another model's
        ("checkpoints/states/4/metrics/commit_success.txt", "garbage", "harmless"),
    ],
)
def test_a_run_with_a_fault_in_a_file_resumes(net, tmp_path, name, kind, expected):
    assert net.check(damaged(net, tmp_path / "copy", (name, kind))) == expected and net.lost == 0


@pytest.mark.usefixtures("standard_promotion")
def test_a_run_with_two_faults_resumes(net, tmp_path):
    arrays = max(storage.newest_arrays(net.folder), key=lambda name: (net.folder / name).stat().st_size)
    assert net.check(damaged(net, tmp_path / "copy", (arrays, "truncate"), ("journal.bin", "garbage"))) == "recovered"
    assert net.lost == 0


@pytest.mark.usefixtures("standard_promotion")
def test_the_drill_finds_what_is_silent_lost_and_unresumable(net, tmp_path, monkeypatch):
    """The negative controls."""
    results = storage.make_subject(storage.RESULTS, tmp_path)
    name = "model/model-00001-of-00003.safetensors"
    copy = damaged(results, tmp_path / "copy", (name, "truncate"))
    assert results.check(copy) == "detected"
    weights = (results.folder / name).read_bytes()
    (copy / name).write_bytes(weights[:-1] + b"\0")
    (copy / "model/SHA256SUMS").unlink()
    assert results.check(copy) == "silent"
    copy = damaged(net, tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr(storage, "_numbers", lambda folder: {0: "1.0"})
        assert net.check(copy) == "silent"
    monkeypatch.setattr(net, "_train", lambda *given: int("x"))
    assert net.check(copy) == "unresumable"


def test_a_reward_that_ends_its_process_shifts_no_score_and_leaves_no_child(monkeypatch):
    monkeypatch.setattr(workers, "FAULTS", {"child": workers.FAULTS["child"]})
    found = workers.worker_drill(faults=1, seed=0)
    assert found == {"worker_faults": {"child": 1}, "silent": 0, "hung": 0, "leaked": 0}


def test_the_drill_finds_wrong_scores_and_processes_that_are_left(monkeypatch):
    """The negative controls."""

    class Sloppy:
        """Scores honest completions wrongly, and leaves a process."""

        def __init__(self, *given, **options):
            self.child = subprocess.Popen(["sleep", "600"])

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def __call__(self, prompts, texts):
            values = np.array([0.0 if text in workers.FAULTS else len(text) for text in texts])
            return Scores(values + (values == values.max()), values >= 0, values == values.min(), values < 0)

    made = []
    monkeypatch.setattr(workers, "Scorer", lambda *given, **options: made.append(Sloppy()) or made[0])
    monkeypatch.setattr(workers, "survivors", lambda mark, within: survivors.survivors(mark, within=0.1))
    found = workers.worker_drill(faults=1, seed=0)
    made[0].child.kill()
    made[0].child.wait()
    assert found["silent"] >= 1 and found["leaked"] == 1
