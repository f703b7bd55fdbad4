"""Every task of the paper, and the multi-agent ones, trains for a few generations with one command."""

import json
import sys

import pytest

from eggroll import envs
from eggroll.envs.registry import SUITES
from eggroll.experiments.rl import __main__ as rl
from eggroll.experiments.rl.presets import PAPER

pytestmark = [
    pytest.mark.usefixtures("standard_promotion"),
    pytest.mark.filterwarnings("ignore"),  # the suites' own warnings
]
MULTI_AGENT = ("mpe/simple_spread_v3", "mpe/simple_speaker_listener_v4", "mpe/simple_reference_v3")
SHORT = ["--evaluation-episodes", "2", "--max-steps", "10", "--checks", "1"]
TINY = ["--population-size", "4", "--generations", "2", *SHORT]


def row(name):
    """A slow row, skipped where its suite is not installed."""
    suite = name.split("/")[0] if "/" in name else "gymnax"
    skip = pytest.mark.skipif(not envs.is_installed(suite), reason=f"needs {suite}: {SUITES[suite].install}")
    return pytest.param(name, marks=[skip, pytest.mark.slow], id=name)


@pytest.fixture(autouse=True)
def imported(request):
    """Import the suite before output is captured: some print and rebind standard output when they are imported."""
    if "env" in request.fixturenames:
        envs.make(request.getfixturevalue("env"))


@pytest.mark.parametrize("env", [row(name) for name in (*PAPER, *MULTI_AGENT)])
def test_trains_and_ends_with_json(env, capsys, tmp_path):
    rl.main(["--env", env, *TINY, "--folder", str(tmp_path)])
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["env"], summary["algorithm"], summary["generations"]) == (env, "eggroll", 2)
    assert summary["invalid"] == 0 and summary["env_steps"] > 0
    assert all(isinstance(summary[name], float) for name in ("mean_return", "random_return"))
    assert (tmp_path / "journal.bin").exists() and (tmp_path / "summary.json").exists()


@pytest.mark.parametrize("env", [row("jumanji/Knapsack-v1"), row(MULTI_AGENT[1])])
def test_ppo_respects_masks_and_agents(env, capsys, tmp_path):
    options = ["--ppo.num-envs", "2", "--ppo.rollout-steps", "8", "--ppo.minibatches", "2", "--env-steps", "32"]
    rl.main(["--env", env, *SHORT, "--algorithm", "ppo", *options, "--folder", str(tmp_path)])
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["algorithm"], summary["env_steps"]) == ("ppo", 32)


def test_a_missing_suite_ends_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "navix", None)
    with pytest.raises(SystemExit, match=r"error: env 'navix/FourRooms-v0' needs the module navix, .*pip install navix"):
        rl.main(["--env", "navix/FourRooms-v0"])
