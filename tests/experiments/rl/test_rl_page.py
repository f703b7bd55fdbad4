"""docs/rl.md is true: its blocks run, its policies learn, its environment runs from the command line."""

import json
import re
from pathlib import Path

import pytest

from eggroll.envs import registry
from eggroll.experiments.rl import __main__ as rl

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("standard_promotion")]
PAGE = Path(__file__).parents[3] / "docs" / "rl.md"
ENVIRONMENT, CHECK, EYES, EVOLVE, RECALL, SIMULATOR, REMOTE = re.findall(
    r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL
)
DEFINITIONS = re.sub(r"^state, history = .*$", "", EVOLVE, flags=re.MULTILINE)


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})

    def run(*blocks):
        names = {"__name__": "page"}
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), names)
        return names

    return run


def test_images(run):
    history = run(ENVIRONMENT, CHECK, EYES, EVOLVE)["history"]
    assert history[0].mean_fitness < -0.3 and history[-1].mean_fitness > 0.2


def test_a_memory(run):
    remembered = run(ENVIRONMENT, EYES, DEFINITIONS, RECALL)["remembered"]
    assert remembered[0].mean_fitness < 0.65 and remembered[-1].mean_fitness > 0.8


def test_ask_and_tell(run):
    pytest.importorskip("gymnasium")
    assert run(ENVIRONMENT, EYES, DEFINITIONS, SIMULATOR)["metrics"].mean_fitness > 400


@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # Ray starts processes
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_ray(run, monkeypatch):
    pytest.importorskip("gymnasium")
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    loop = SIMULATOR[: SIMULATOR.index("for generation")]
    try:
        assert run(ENVIRONMENT, EYES, DEFINITIONS, loop, REMOTE)["metrics"].mean_fitness > 400
    finally:
        ray.shutdown()


def test_the_command_line(run, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    Path("catch.py").write_text(ENVIRONMENT + EYES)
    options = ["--env", "catch", "--import", "catch.py", "--network", "catch.py:Eyes", "--env-steps", "2000"]
    rl.main([*options, "--folder", str(tmp_path), "--evaluation-episodes", "20"])
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["env"] == "catch" and summary["env_steps"] >= 2000 and -1 <= summary["mean_return"] <= 1
