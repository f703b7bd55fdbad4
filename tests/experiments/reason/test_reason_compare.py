"""The comparison of EGGROLL and GRPO on one clock: its rows, what it runs and what not, and what it refuses."""

import json
import os
import sys

import pytest

from eggroll.experiments.reason import suite
from eggroll.experiments.reason.suite import make_row, make_table
from tests.experiments.reason.reason_runs import TINY


def summary(accuracy, **more):
    known = {"test_accuracy": accuracy, "test_accuracy_before": 0.5, "generations": 10, "tokens_per_second": 1000.4}
    return known | {"training_seconds": 2.0, "peak_mib": 100, "interval": [accuracy - 0.6, accuracy - 0.4]} | more


def test_rows_and_table():
    row = make_row("rwkv7", "grpo", [summary(0.75), summary(0.5, peak_mib=1200)])
    assert row["test_accuracy"] == 0.625 and row["by_seed"] == [0.75, 0.5] and row["training_seconds"] == [2.0, 2.0]
    gains = "+0.150 to +0.350, -0.100 to +0.100"
    cells = ["rwkv7", "grpo", "0.500", "0.750, 0.500", "0.625", gains, "10", "1,000", "100 to 1,200"]
    assert make_table([row]).splitlines()[2] == f"| {' | '.join(cells)} |"
    alone = make_row("rwkv7", "grpo", [summary(0.75, interval=[None, None])])  # of one problem
    assert make_table([alone]).splitlines()[2].split(" | ")[5] == "none"


@pytest.mark.slow
def test_a_comparison_runs_what_is_missing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    core = str(max(os.sched_getaffinity(0)))
    options = ["--architectures", "transformer", "--seeds", "2", "--generations", "2", "--cores", core, *TINY]
    options += ["--folder", "out/study", "--grpo.prompts", "2", "--grpo.samples", "2", "--figure", "figure.png"]
    suite.main(options)
    out = capsys.readouterr().out.splitlines()
    first = json.loads(out[-1])
    assert first["failed"] == {}
    assert [(row["algorithm"], row["generations"]) for row in first["rows"]] == [("eggroll", [2, 2]), ("grpo", [2, 2])]
    assert [line.rpartition(":")[0] for line in out[:4]] == [
        f"transformer {algorithm} seed {seed}" for seed in (0, 1) for algorithm in ("eggroll", "grpo")
    ]
    for name in ("out/study/table.md", "out/study/curves.png", "out/study/results.json", "figure.png"):
        assert (tmp_path / name).stat().st_size > 0, name
    monkeypatch.setattr(sys, "executable", "false")  # nothing can be run any more
    suite.main(options)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == first["rows"]
    for other, words in (
        (["--seconds", "7"], "has runs with other limits"),
        (["--clock", "processor"], "has a run with another clock"),
        (["--sigma", "0.5"], "has a run with another sigma"),
    ):
        with pytest.raises(SystemExit, match=words):
            suite.main([*options, *other])
    with pytest.raises(SystemExit) as ended:
        suite.main([*options, "--seeds", "3"])
    failed = json.loads(capsys.readouterr().out.splitlines()[-1])["failed"]
    assert ended.value.code == 1 and list(failed) == ["transformer eggroll seed 2", "transformer grpo seed 2"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seeds", "0"], "error: seeds must be an integer >= 1, got 0."),
        (["--algorithms", "grpo", "grpo"], "error: algorithms must be different ones, at least one, got ('grpo', 'grpo')."),
        (["--cores", "9999"], "error: cores must be out of ["),
        (["--sigma", "-1"], "error: sigma must be a finite number > 0, got -1.0."),
    ],
)
def test_bad_options_end_with_a_clear_error(options, words, tmp_path):
    with pytest.raises(SystemExit) as ended:
        suite.main([*options, "--folder", str(tmp_path)])
    assert str(ended.value).startswith(words)
