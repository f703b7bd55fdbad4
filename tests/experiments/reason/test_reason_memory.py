"""What a run keeps in memory: one copy of parameters, masters and moments, and nothing of the state that it started with."""

import sys

import pytest

from eggroll.experiments.reason.__main__ import run
from eggroll.experiments.reason.config import parse
from tests.experiments.reason.reason_runs import letters, measure_copies, tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("standard_promotion"),
    pytest.mark.filterwarnings("ignore:no completion up to generation"),
]
LARGER = ["--check-every", "100", "--examples", "0", "--start.width", "64", "--start.layers", "2", "--generations", "2"]


@pytest.mark.parametrize(
    ("options", "copies"),
    [
        (["--optimizer", "sgd"], 1),
        (["--optimizer", "adam", "--anchor", "0.1", "--seeds", "2"], 4),  # the anchor is one
        (["--algorithm", "grpo", "--grpo.prompts", "2", "--grpo.samples", "2"], 3),
    ],
)
def test_one_copy_of_the_state_lives(options, copies, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules["eggroll.envs.tasks.arithmetic"], "answer_matches", letters)
    found = measure_copies(monkeypatch)
    run(parse(tiny(*LARGER, *options)))
    assert found and max(found) < copies + 0.3, found
