"""The fault drill in small: killed in every kind of moment, resumed, equal to the bit; every damage found."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from eggroll.experiments.faultdrill import kills

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
    assert summary["damages_found"] >= 4 and summary["damages_found"] + summary["damages_harmless"] == 8  # the journal's four


def test_a_training_that_fails_ends_the_drill_with_its_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    drill = kills.Drill(dict.fromkeys(kills.MOMENTS, 0))
    with pytest.raises(RuntimeError, match="the training exited with 1"):
        drill.start(tmp_path, 10, 5)
