"""The fault drill in small: killed in every kind of moment, resumed, equal to the bit; every damage found."""

import json
import sys

import pytest

from experiments import faultdrill


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")  # optax.adam relies on it
def test_a_killed_run_ends_as_an_undisturbed_one(capsys, tmp_path):
    faultdrill.main(["--kills", "3", "--generations", "60", "--damages", "8", "--folder", str(tmp_path / "drill")])
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["kills_in"] == {"training": 1, "journal": 1, "checkpoint": 1} and summary["bit_equal"]
    assert summary["lost_generations"] == 0 and summary["damages_silent"] == 0
    assert summary["damages_found"] >= 4 and summary["damages_found"] + summary["damages_harmless"] == 8  # the journal's four


def test_a_training_that_fails_ends_the_drill_with_its_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    drill = faultdrill.Drill(dict.fromkeys(faultdrill.MOMENTS, 0))
    with pytest.raises(RuntimeError, match="the training ended with 1"):
        drill.start(faultdrill.Config(), tmp_path, None, seconds=None)
