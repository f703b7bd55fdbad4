"""The fault drill in small: killed in every kind of moment, resumed, equal to the bit; every damage found or recovered."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from eggroll.experiments.faultdrill import kills, storage

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_killed_run_ends_as_an_undisturbed_one(tmp_path):
    options = ["--kills", "4", "--generations", "80", "--damages", "8", "--folder", str(tmp_path / "drill")]
    done = subprocess.run(
        [sys.executable, "-m", "eggroll.experiments.faultdrill", *options], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["kills_in"] == {"start": 1, "training": 1, "journal": 1, "checkpoint": 1} and summary["bit_equal"]
    assert summary["lost_generations"] == 0 and summary["damages_silent"] == 0
    assert summary["storage_faults"] > 200 and summary["silent"] == summary["unresumable"] == 0
    assert summary["damages_found"] >= 4 and summary["damages_found"] + summary["damages_harmless"] == 8  # the journal's four


def test_a_training_that_fails_ends_the_drill_with_its_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    drill = kills.Drill(dict.fromkeys(kills.MOMENTS, 0))
    with pytest.raises(RuntimeError, match="the training exited with 1"):
        drill.start(tmp_path, 10, 5)


@pytest.fixture(scope="module")
def storage_drill(tmp_path_factory):
    with jax.numpy_dtype_promotion("standard"):
        return storage._Drill(tmp_path_factory.mktemp("storage") / "drill", random.Random(0))


def damaged(drill, case, name, kind, tmp_path):
    copy = shutil.copytree(case.folder, tmp_path / "copy")
    assert storage._inflict(copy / name, kind, drill.chance)
    return copy


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # tasks that orbax abandons on damaged files
@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("journal.bin", "flip", "recovered"),
        ("journal.bin", "garbage", "recovered"),
        ("journal.bin", "delete", "recovered"),
        ("metrics.jsonl", "garbage", "recovered"),
        ("checkpoints/config.json", "truncate", "recovered"),
        ("checkpoints/states/30/metrics/metrics", "delete", "recovered"),
        ("checkpoints/states/10/metrics/commit_success.txt", "garbage", "harmless"),
    ],
)
def test_a_run_with_a_fault_in_a_file_resumes(storage_drill, tmp_path, name, kind, expected):
    copy = damaged(storage_drill, storage_drill.run, name, kind, tmp_path)
    assert storage_drill.resume(copy) == expected and storage_drill.lost == 0


@pytest.mark.usefixtures("standard_promotion")
def test_the_drill_finds_what_is_silent_lost_and_unresumable(storage_drill, tmp_path, monkeypatch):
    """The negative controls."""
    copy = shutil.copytree(storage_drill.model.folder, tmp_path / "copy")
    weights = copy / "model-00001-of-00003.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    assert storage_drill.load(copy) == "detected"
    (copy / "SHA256SUMS").unlink()
    assert storage_drill.load(copy) == "silent"
    copy = shutil.copytree(storage_drill.run.folder, tmp_path / "run")
    monkeypatch.setattr(storage, "_numbers", lambda folder: {0: (1.0,)})
    assert storage_drill.resume(copy) == "silent"
    monkeypatch.setattr(storage, "work", lambda *given, **options: int("x"))
    assert storage_drill.resume(copy) == "unresumable"
