"""The benchmark against evosax: its table by hand, its refusals, one small run of our side."""

import importlib.util
import json
import math
import os
from pathlib import Path

import jax
import pytest

from eggroll.experiments.bench import rl, rl_sides
from eggroll.experiments.bench.rl_sides import Side, run
from eggroll.experiments.common.run import jsonable
from eggroll.experiments.rl.inputs import load

SMALL = {"env": "CartPole-v1", "population_size": 8, "episodes": 1, "sigma": 0.05, "learning_rate": 0.01, "hidden_sizes": (4,)}


def row(seconds, generations, members_per_second, peak_mib):
    warm = None if seconds is None else seconds / 4
    return dict(zip(rl.COLUMNS, (seconds, warm, generations, members_per_second, peak_mib, 1.0), strict=True))


def test_ratios_of_medians_by_hand():
    ours = [row(1.0, 5, 100.0, 400.0), row(3.0, 7, None, 500.0), row(2.0, 6, 300.0, 450.0)]
    theirs = [row(4.0, 10, 50.0, 900.0), row(None, None, 60.0, 900.0), row(8.0, 12, 70.0, 900.0)]
    summary = rl.summarise({"ours": ours, "evosax": theirs})
    assert summary["seconds_ratio"] == 2 / 8 and summary["generations_ratio"] == 6 / 12  # a failure is infinitely long
    assert (
        summary["warm_seconds_ratio"] == 0.25
        and summary["memory_ratio"] == 0.5
        and summary["ours"]["members_per_second"] == 200
    )
    unreached = rl.summarise({"ours": ours, "evosax": [row(None, None, None, 900.0)]})
    assert unreached["seconds_ratio"] == 0 and jsonable(unreached["evosax"]["seconds"]) is None
    assert math.isnan(unreached["evosax"]["members_per_second"])


@pytest.mark.usefixtures("standard_promotion")
def test_our_side_takes_the_statistics_along():
    side = Side(library="ours", seed=0, target=1.0, generations=1, **SMALL)
    task = load(side.config)
    advance = rl_sides.ours(side, task, task.init_params(key=jax.random.key(0)), key=jax.random.key(1))
    assert advance(0)[1].number >= 8


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_our_side_reaches_an_easy_target_and_misses_a_hard_one():
    easy = run(Side(library="ours", seed=0, target=1.0, generations=5, **SMALL))
    assert easy["generations"] == 1 and easy["seconds"] > 0 and easy["members_per_second"] is None
    hard = run(Side(library="ours", seed=0, target=501.0, generations=4, **SMALL))
    assert hard["generations"] is None and hard["seconds"] is None and hard["members_per_second"] > 0
    assert hard["peak_mib"] > 50 and hard["growth_mib"] >= 0


def test_every_run_is_printed_and_the_last_line_is_json(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(rl.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(rl.importlib.metadata, "version", lambda name: "0")

    def side(config, *, library, seed):
        calls.append((seed, library))
        return row(2.0 if library == "ours" else 4.0, 5, None, 100.0)

    monkeypatch.setattr(rl, "run_side", side)
    monkeypatch.setattr(rl, "run_tiny", lambda: {"scan_ratio": 0.5})
    rl.run(rl.RL(seeds=2))
    lines = capsys.readouterr().out.splitlines()
    assert calls == [(0, "ours"), (0, "evosax"), (1, "ours"), (1, "evosax")] and len(lines) == 8
    summary = json.loads(lines[-1])
    assert (
        summary["seconds_ratio"] == summary["scan_ratio"] == 0.5
        and len(summary["runs"]["ours"]) == 2
        and summary["config"]["seeds"] == 2
    )


def test_missing_evosax_is_refused_by_a_clear_error(monkeypatch):
    monkeypatch.setattr(rl.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"^error: .* needs evosax.*; pip install 'evosax>=0.3' installs it"):
        rl.run(rl.RL())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seeds": 0}, "error: seeds must be an integer >= 1, got 0."),
        ({"population_size": 7}, "error: population_size must be an even integer >= 2, got 7."),
        ({"env": "brax/ant"}, "error: env must be a gymnax environment, which both libraries support, got 'brax/ant'."),
    ],
)
def test_wrong_settings_are_refused_by_a_clear_error(settings, words):
    with pytest.raises(SystemExit) as ended:
        rl.run(rl.RL(**settings))
    assert str(ended.value) == words


def test_the_second_process_has_the_compilation_cache_of_the_first(monkeypatch):
    found = []

    def process(argument, *, name, cache):
        found.append((cache, os.listdir(cache)))
        Path(cache, "program").touch()
        return row(8.0 / len(found), 5, None, 100.0)

    monkeypatch.setattr(rl, "_run_process", process)
    made = rl.run_side(rl.RL(), library="ours", seed=0)
    assert made["seconds"] == 8.0 and made["warm_seconds"] == 4.0
    (first, before), (second, after) = found
    assert first == second and before == [] and after == ["program"] and not os.path.exists(first)


@pytest.mark.slow
def test_a_failing_process_is_refused_by_a_clear_error():
    with pytest.raises(SystemExit, match=r"^error: seed 0 of ours failed: .*NoSuch"):
        rl.run_side(rl.RL(env="NoSuch"), library="ours", seed=0)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("evosax") is None, reason="evosax is not installed")
def test_a_tiny_problem_is_timed(standard_promotion):
    found = rl_sides.tiny(scan=4, repeats=2)
    assert found["scan_ratio"] == found["scan_ms"] / found["evosax_scan_ms"] and found["train_ratio"] > 0.5


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("evosax") is None, reason="evosax is not installed")
def test_both_libraries_learn():
    for library in rl.LIBRARIES:
        assert rl.run_side(rl.RL(target=200.0, generations=40), library=library, seed=0)["generations"] <= 40
