"""The comparison of algorithms: its statistics, what it runs again and what not, and what it refuses."""

import json
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from eggroll.experiments.common.bootstrap import difference_interval, mean_interval
from eggroll.experiments.common.seed_runs import search
from eggroll.experiments.rl import suite as rl_suite
from eggroll.experiments.rl.figure import Curve, _draw
from eggroll.experiments.rl.search import SEED
from eggroll.experiments.rl.suite import (
    add_equal_seconds,
    compare,
    make_row,
    make_setting,
    make_table,
    read_curve,
    search_settings,
)

SHORT = ["--evaluation-episodes", "4", "--max-steps", "20"]
TINY = ["--population-size", "4", "--hidden-sizes", "4", "--env-steps", "100", *SHORT]


def summary(mean_return, *, random_return=0.0, generation_seconds=1.0):
    return {
        "mean_return": mean_return,
        "random_return": random_return,
        "env_steps": 10,
        "seconds": 2.0,
        "generation_seconds": generation_seconds,
        "peak_mib": 100,
    }


def test_interval_covers_the_mean_about_as_often_as_it_says():
    """Of normal samples of 20 the 95 % percentile bootstrap covers about 93 %; 400 trials, 5 standard errors."""
    rng = np.random.default_rng(0)
    covered = [low <= 0 <= high for low, high in (mean_interval(rng.normal(size=20)) for _ in range(400))]
    assert abs(np.mean(covered) - 0.93) < 5 * np.sqrt(0.93 * 0.07 / 400)


def test_interval_of_a_difference():
    low, high = difference_interval([1.0, 2.0, 3.0], [11.0, 12.0, 13.0])
    assert -12 <= low < -10 < high <= -8
    assert difference_interval([2.0, 2.0], [2.0, 2.0]) == (0.0, 0.0)


def test_compare_and_table():
    rows = [
        make_row("a", "eggroll", [summary(v, generation_seconds=0.5) for v in (5.0, 6.0)]),
        make_row("a", "openes", [summary(v) for v in (9.0, 8.0)]),
        make_row("b", "eggroll", [summary(v) for v in (-1.0, 2.0)]),
        make_row("b", "openes", [summary(v) for v in (1.0, 0.5)]),
        make_row("c", "ppo", [summary(v) for v in (1.0, 0.5)]),
    ]
    said = compare(rows)
    assert said["not_worse"] == {"a": False, "b": True}  # and c has no pair
    assert said["generation_ratio"] == {"a": 2.0, "b": 1.0}
    assert said["above_random"] == {
        "a": {"eggroll": True, "openes": True},
        "b": {"eggroll": False, "openes": True},
        "c": {"ppo": True},
    }
    lines = make_table(rows).splitlines()
    assert lines[2] == "| a | eggroll | 5.5 [5, 6] | 0 | 2 | 10 | 2.0 | - | 0.5 | 100 |" and len(lines) == 7


def test_returns_at_equal_seconds_are_those_of_the_last_checks_until_the_quickest_run_ended():
    quick = [Curve([5, 10], [1.0, 2.0], [3.0, 7.0]), Curve([5, 10], [1.0, 3.0], [4.0, 9.0])]
    slow = [Curve([5, 10], [1.9, 8.0], [30.0, 70.0]), Curve([5, 10], [1.5, 9.0], [40.0, 90.0])]
    late, curves = [Curve([5], [2.1], [1.0])], {"eggroll": quick, "ppo": slow}
    rows = [add_equal_seconds(make_row("a", name, [summary(0.0)] * 2), curves) for name in curves]
    assert [(row.equal_seconds, row.return_then, row.low_then, row.high_then) for row in rows] == [
        (2.0, 5.5, 4.0, 7.0),  # the second seed's last check came a second later
        (2.0, 35.0, 30.0, 40.0),
    ]
    assert " 5.5 [4, 7] at 2.0 " in make_table(rows)
    row = add_equal_seconds(make_row("a", "openes", [summary(0.0)]), curves | {"openes": late})
    assert row.equal_seconds == 2.0 and np.isnan(row.return_then)
    untrained = make_row("a", "random", [summary(0.0)])
    assert np.isnan(add_equal_seconds(untrained, curves | {"random": [Curve([], [], [])]}).equal_seconds)


def test_seconds_are_those_of_training_without_compilation(tmp_path):
    rows = [{"seconds": seconds, "env_steps": 10 * n} for n, seconds in enumerate([9.0, 0.1, 0.2, 0.1, 0.1], 1)]
    rows[0]["held_out_return"], rows[3]["held_out_return"] = 1.0, 2.0
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curve = read_curve(tmp_path)
    assert curve.env_steps == [10, 40] and curve.seconds == pytest.approx([0.1, 0.5]) and curve.returns == [1.0, 2.0]


def test_generations_of_one_program_share_its_compilation_and_checks_of_nan_count(tmp_path):
    rows = [{"seconds": seconds, "env_steps": 10 * n} for n, seconds in enumerate([0.5, 0.5, 0.1, 0.1, 0.1], 1)]
    rows[1]["held_out_return"], rows[4]["held_out_return"] = 1.0, None
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curve = read_curve(tmp_path)
    assert curve.seconds == pytest.approx([0.2, 0.5]) and curve.returns[0] == 1.0 and np.isnan(curve.returns[1])
    row = make_row("a", "ppo", [summary(0.0, random_return=None, generation_seconds=0.0)])
    assert np.isnan(row.random_return) and np.isnan(add_equal_seconds(row, {"ppo": [curve]}).return_then)
    assert np.isnan(compare([row._replace(algorithm=name) for name in ("eggroll", "openes")])["generation_ratio"]["a"])


def test_curves_that_do_not_overlap_are_drawn_to_the_end_of_the_last():
    panel = Figure().subplots()
    _draw(panel, "eggroll", [Curve([1, 2], [1.0, 2.0], [0.0, 1.0]), Curve([1, 2], [4.0, 6.0], [2.0, 3.0])], "seconds")
    assert panel.lines[0].get_xdata()[[0, -1]].tolist() == [4, 6] and panel.lines[0].get_ydata()[-1] == 2


def test_a_budget_multiplies_the_steps_of_each_task(tmp_path):
    tasks = ("Pendulum-v1", "CartPole-v1")
    found = [make_setting(tmp_path, env, "eggroll", [], budget=5.0).options["env_steps"] for env in tasks]
    assert found == [10_000_000, 5_000_000]


@pytest.mark.slow
def test_a_suite_runs_what_is_missing(capsys, tmp_path, monkeypatch):
    """The second start finds everything; without one seed it runs that seed and gets the same numbers."""
    options = ["--envs", "CartPole-v1", "--algorithms", "eggroll", "random", "--seeds", "2", "--folder", str(tmp_path), *TINY]
    rl_suite.main(options)
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert first["failed"] == {} and [(row["algorithm"], row["seeds"]) for row in first["rows"]] == [
        ("eggroll", 2),
        ("random", 2),
    ]
    for name in ("table.md", "curves.png", "results.json", "CartPole-v1/eggroll/seed-1/checkpoint"):
        assert (tmp_path / name).exists(), name
    (tmp_path / "CartPole-v1/eggroll/seed-1/summary.json").unlink()
    rl_suite.main(options)
    second = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert second["rows"][0]["returns"] == first["rows"][0]["returns"]
    monkeypatch.setattr(sys, "executable", "false")  # nothing can be run any more
    rl_suite.main(options)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == second


@pytest.mark.slow
def test_other_options_are_refused_and_a_failed_run_is_told(capsys, tmp_path, monkeypatch):
    options = ["--envs", "CartPole-v1", "--algorithms", "random", "--seeds", "1", "--folder", str(tmp_path), *SHORT]
    rl_suite.main(options)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        rl_suite.main([*options, "--max-steps", "30"])
    failed = json.loads(capsys.readouterr().out.splitlines()[-1])["failed"]["CartPole-v1 random"]
    assert "has a run with another max_steps; choose another folder." in failed
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(SystemExit):
        rl_suite.main([*options, "--folder", str(tmp_path / "new")])
    out = capsys.readouterr().out.splitlines()
    assert json.loads(out[-1])["failed"] == {"CartPole-v1 random": "it ended with 1"} and "it ended with 1" in out[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--envs", "CartPole"], "error: env must name an environment, got 'CartPole'; did you mean CartPole-v1"),
        (["--seeds", "0"], "error: seeds must be an integer >= 1, got 0."),
        (["--search", "-1"], "error: search must be an integer >= 0, got -1."),
        (["--jobs", "0"], "error: jobs must be an integer >= 1, got 0."),
        (["--envs", "CartPole-v1", "--sigma", "-1"], "error: sigma must be a finite number > 0"),
    ],
)
def test_bad_options_end_with_a_clear_error(options, words, tmp_path):
    with pytest.raises(SystemExit) as ended:
        rl_suite.main([*options, "--folder", str(tmp_path)])
    assert str(ended.value).startswith(words)


def test_search_draws_the_same_settings_for_both_and_takes_the_best(tmp_path):
    """Scores are on disk, so nothing is run."""
    rows = [make_setting(tmp_path, "CartPole-v1", name, ()) for name in ("eggroll", "openes")]
    ours, dense = (search_settings(row, ("--sigma", "0.3"), number=3) for row in rows)
    for mine, theirs in zip(ours, dense, strict=True):
        rank = {"rank": mine.options["rank"]}  # dense noise has none
        assert mine.options == theirs.options | {"algorithm": "eggroll"} | rank and mine.options["sigma"] == 0.3
        assert "--rank" in mine.arguments and (rank == {"rank": 1} or "--rank" not in theirs.arguments)
    assert len({row.arguments for row in ours}) == 3

    def best(*scores):
        for setting, score in zip(ours, scores, strict=True):
            folder = setting.folder / f"seed-{SEED}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "summary.json").write_text(json.dumps({"options": setting.options, "mean_return": score}))
        return search(rl_suite.MODULE, ours, seed=SEED, score=lambda summary: summary["mean_return"])

    assert best(1.0, None, 3.0) == ours[2]
    with pytest.raises(RuntimeError, match="no run of the search has a finite score"):
        best(None, None, None)
