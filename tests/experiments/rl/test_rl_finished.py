"""What a run says at its end, and what becomes of it: `--evaluate RUN`, `--render RUN`, three lines of Python."""

import contextlib
import io
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from eggroll.experiments.common.run import INTERRUPTED, write_json
from eggroll.experiments.rl import __main__ as rl
from eggroll.experiments.rl import baseline, evolution
from eggroll.experiments.rl.config import Config
from eggroll.experiments.rl.finished import is_asked_for, load_run
from eggroll.experiments.rl.report import interval

pytestmark = pytest.mark.usefixtures("standard_promotion")  # optax.adam relies on it
SMALL = ["--population-size", "16", "--generations", "6", "--hidden-sizes", "8", "--evaluation-episodes", "20"]
SMALL += ["--env-steps", "4000", "--checks", "10", "--target", "501"]
ROOT = Path(__file__).parents[3]


def run(*arguments):
    """What the command prints: the lines, and the summary in the last one."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        rl.main(arguments)
    *lines, last = out.getvalue().splitlines()
    return lines, json.loads(last)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Lines, summary and folder of a small run."""
    folder = tmp_path_factory.mktemp("finished")
    with jax.numpy_dtype_promotion("standard"):
        return *run(*SMALL, "--folder", str(folder)), folder


@pytest.mark.slow
def test_a_run_says_why_it_ended_and_is_loaded_again(finished):
    lines, summary, folder = finished
    assert re.fullmatch(r"seed 0: ended by --generations 6 after 6 generations, [\d,]+ steps, [\d.]+ s", lines[0])
    assert re.fullmatch(r"seed 0: return [\d.]+ \[[\d.]+, [\d.]+\] of 20 episodes, random [\d.]+", lines[1])
    assert re.fullmatch(r"seed 0: best check [\d.]+ at [\d,]+ steps, whose parameters return [\d.]+", lines[2])
    assert all(len(line) <= 80 for line in lines[:3])
    stored = json.loads((folder / "summary.json").read_text())
    for which, name in (("best", "best_return"), ("last", "mean_return")):
        lines, found = run("--evaluate", str(folder), "--parameters", which)
        assert found["episodes"] == 20  # as in its own evaluation
        assert found["mean_return"] == pytest.approx(summary[name]) and found["random_return"] == summary["random_return"]
        assert found["interval"][0] < found["mean_return"] < found["interval"][1] and f"{which} parameters" in lines[0]
        assert (folder / stored["parameters"][which]).is_dir()
    (folder / "best").rename(folder / "best.old")  # as a kill leaves it
    found = run("--evaluate", str(folder), "--episodes", "20")[1]
    (folder / "best.old").rename(folder / "best")
    assert found["mean_return"] == pytest.approx(summary["best_return"])


@pytest.mark.slow
def test_the_lines_of_the_page(finished, monkeypatch, tmp_path):
    """The block of docs/rl.md, and the command, draw an episode."""
    *_, folder = finished
    page = (ROOT / "docs/rl.md").read_text()
    block = re.search(r"## After the run.*?```py\n(.*?)```", page, flags=re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/rl-CartPole-v1-eggroll-0").symlink_to(folder)
    exec(block, {})
    assert Path("policy.gif").read_bytes().startswith(b"GIF8")
    assert run("--render", str(folder), "--seed", "3")[1]["picture"] == f"{folder}/policy.gif"
    assert (folder / "policy.gif").read_bytes().startswith(b"GIF8")


def write_run(folder, options, **fields):
    folder.mkdir()
    write_json(folder / "summary.json", {"options": options, "seed": 0, **fields})
    return folder


def test_a_folder_that_has_no_such_run_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options, folder = Config().options(), tmp_path / "run"
    (tmp_path / "runs").mkdir()
    write_run(tmp_path / "runs/named", options | {"imports": ["away/mine.py"]}, parameters={"best": "best"})
    (tmp_path / "runs/named/best").mkdir()
    several, other = tmp_path / "several", tmp_path / "other"
    (several / "seed-1").mkdir(parents=True)
    write_run(other, {"model": "small"})
    write_run(folder, options, parameters={"best": "best"})
    write_run(tmp_path / "random", options | {"algorithm": "random"})
    write_run(tmp_path / "empty", options)
    for given, words in (
        ([str(tmp_path)], f"error: {tmp_path} has no finished run: there is no summary.json in it."),
        ([str(several)], f"error: {several} has the runs of several seeds; name one of seed-1 in it."),
        ([str(other)], f"error: {other} is a run of another experiment than experiments.rl."),
        (["absent"], "error: there is no folder runs/absent."),
        (["named"], "error: runs/named was trained with --import away/mine.py, which is not here: run this in the folder of"),
        (["named", "--import", "nowhere.py"], "error: --import: there is no file nowhere.py."),
        (["named", "--parameters", "last"], "error: runs/named has no last parameters: there is no folder runs/named/last."),
        ([str(folder), "--env", "Acrobot-v1"], f"error: {folder} is a run of CartPole-v1, not of Acrobot-v1; leave --env out"),
        ([str(tmp_path / "random")], f"error: {tmp_path}/random is a run of random actions, which has no parameters."),
        ([str(tmp_path / "empty")], f"error: {tmp_path}/empty has no best parameters"),
        ([str(folder), "--render", str(other)], "error: --evaluate and --render must name one run"),
        ([str(folder), "--episodes", "0"], "error: episodes must be an integer >= 1, got 0."),
    ):
        with pytest.raises(SystemExit) as ended:
            rl.main(["--evaluate", *given])
        assert str(ended.value).startswith(words) and "\n" not in str(ended.value), ended.value


@pytest.mark.slow
def test_a_folder_of_another_environment_is_a_clear_error(finished, tmp_path):
    *_, folder = finished
    summary = (folder / "summary.json").read_bytes()
    options = json.loads(summary)["options"] | {"env": "Pendulum-v1"}
    write_run(tmp_path / "other", options, parameters={"best": "best"})
    (tmp_path / "other/best").symlink_to(folder / "best")
    with pytest.raises(SystemExit, match=r"error: the parameters in .*best do not fit the environment and the network"):
        rl.main(["--evaluate", str(tmp_path / "other")])
    with pytest.raises(SystemExit, match=r"error: .*other settings: env \(was 'CartPole-v1', is 'Acrobot-v1'\)"):
        rl.main([*SMALL, "--env", "Acrobot-v1", "--folder", str(folder), "--resume"])
    assert (folder / "summary.json").read_bytes() == summary  # it is still a finished run


@pytest.mark.slow
def test_a_run_that_is_stopped_says_how_far_it_came(capsys, tmp_path, monkeypatch):
    """Its best parameters can be loaded; the same command with --resume continues to the same best."""
    options = [*SMALL, "--folder", str(tmp_path), "--checkpoint-every", "2"]
    checked = evolution._Progress.__call__

    def interrupt(progress, state, record):
        if record.generation == 3:
            raise KeyboardInterrupt
        return checked(progress, state, record)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(evolution._Progress, "__call__", interrupt)
        rl.main(options)
    out, err = capsys.readouterr()
    assert stopped.value.code == INTERRUPTED and err.splitlines()[-1] == rl.STOPPED
    assert re.search(r"seed 0: stopped after [\d,]+ steps, best check [\d.]+ at [\d,]+ steps, random [\d.]+;", out)
    assert load_run(tmp_path).returns(episodes=4).shape == (4,)
    with pytest.raises(FileNotFoundError, match="has no last parameters: the run has not ended"):
        load_run(tmp_path, parameters="last")
    whole = run(*SMALL, "--folder", str(tmp_path / "whole"))[1]
    resumed = run(*options, "--resume")[1]
    assert [resumed[name] for name in ("best_check", "best_return")] == [whole[name] for name in ("best_check", "best_return")]


@pytest.mark.slow
def test_a_policy_of_ppo_is_loaded_too_until_another_run_begins(tmp_path, monkeypatch):
    sizes = ["--ppo.num-envs", "4", "--ppo.rollout-steps", "8", "--hidden-sizes", "8", "--env-steps", "128", "--checks", "2"]
    lines, summary = run("--algorithm", "ppo", "--env", "Pendulum-v1", *sizes, "--folder", str(tmp_path))
    assert lines[0].startswith("seed 0: ended by --env-steps 128 after 4 updates, 128 steps")
    assert run("--evaluate", str(tmp_path))[1]["mean_return"] == pytest.approx(summary["best_return"])
    drawn = (tmp_path / "fitness.png").read_bytes()
    check, calls = baseline.HeldOutChecks.__call__, []

    def stop(*given, **named):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return check(*given, **named)

    monkeypatch.setattr(baseline.HeldOutChecks, "__call__", stop)
    with pytest.raises(SystemExit):
        rl.main(["--algorithm", "ppo", "--env", "Pendulum-v1", *sizes, "--folder", str(tmp_path), "--seed", "1"])
    assert (tmp_path / "fitness.png").read_bytes() != drawn and not (tmp_path / "checkpoint").exists()


def test_render_without_a_folder_belongs_to_training():
    assert not is_asked_for(["--render", "--env", "CartPole-v1"]) and not is_asked_for(
        ["--evaluation-episodes", "3", "--render"]
    )
    assert is_asked_for(["--render", "runs/x"]) and is_asked_for(["--evaluate=runs/x"]) and is_asked_for(["--render=runs/x"])


def test_interval_of_a_mean():
    low, high = interval(np.array([1.0, 3.0]))
    assert (low, high) == pytest.approx((2 - 1.96, 2 + 1.96)) and np.isnan(interval([1.0])).all()
