"""The comparison of recipes: its rows, what it runs and what not, and what it refuses."""

import json
import sys

import pytest

from eggroll.experiments.zo import suite as zo_suite
from eggroll.experiments.zo.config import parse
from eggroll.experiments.zo.suite import make_row, make_table

pytestmark = pytest.mark.usefixtures("standard_promotion")  # optax.adam relies on it
TINY = ["--start.steps", "0", "--start.width", "16", "--start.layers", "1", "--batch-size", "2", "--checks", "2"]


def summary(accuracy, **more):
    known = {"test_accuracy": accuracy, "test_accuracy_before": 0.5, "train_loss": 0.25, "steps": 10, "forwards": 20}
    return known | {"seconds": 2.0, "forwards_per_second": 10.0, "peak_mib": 100} | more


def test_rows_and_table():
    config = parse(["--recipe", "lozo", "--learning-rate", "0.01", "--sigma", "0.001", "--options", "rank=4"])
    row = make_row(config, [summary(0.75), summary(0.5, peak_mib=200)], ceiling=1.0, step_mib=1.25)
    assert (row.test_accuracy, row.below_backprop, row.low, row.high, row.peak_mib) == (0.625, 0.375, 0.5, 0.75, 200)
    cells = ["lozo", "sigma=0.001 rate=0.01 rank=4", "0.625 [0.500, 0.750]", "0.375", "0.500", "0.250", "2", "10", "20"]
    assert make_table([row]).splitlines()[2] == f"| {' | '.join([*cells, '2', '10', '1.2', '200'])} |"


@pytest.mark.slow
def test_a_suite_searches_and_runs_what_is_missing(capsys, tmp_path, monkeypatch):
    """Every recipe sees as many forwards; the second start finds everything."""
    monkeypatch.chdir(tmp_path)
    options = ["--recipes", "mezo", "adam", "--seeds", "2", "--forwards", "8", "--search", "--folder", "out/suite", *TINY]
    zo_suite.main(options)
    out = capsys.readouterr().out.splitlines()
    first = json.loads(out[-1])
    assert first["failed"] == {} and [(row["recipe"], row["steps"], row["forwards"]) for row in first["rows"]] == [
        ("mezo", 4, 8),
        ("adam", 4, 4),
    ]
    assert sum(line.startswith("  --recipe mezo") for line in out) == 3
    assert first["rows"][0]["below_backprop"] == pytest.approx(
        first["rows"][1]["test_accuracy"] - first["rows"][0]["test_accuracy"]
    )
    for name in ("table.md", "curves.png", "results.json", "mezo/seed-1/model/config.json"):
        assert (tmp_path / "out" / "suite" / name).exists(), name
    monkeypatch.setattr(sys, "executable", "false")  # nothing can be run any more
    zo_suite.main(options)
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["rows"] == first["rows"]
    with pytest.raises(SystemExit):
        zo_suite.main([*options, "--batch-size", "3"])
    failed = json.loads(capsys.readouterr().out.splitlines()[-1])["failed"]
    assert "has a run with another batch_size; choose another folder." in failed["mezo"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seeds", "0"], "error: seeds must be an integer >= 1, got 0."),
        (["--recipes", "meso"], "error: recipe must be one of mezo, "),
        (["--sigma", "-1", "--recipes", "mezo"], "error: sigma must be a finite number > 0, got -1.0."),
    ],
)
def test_bad_options_end_with_a_clear_error(options, words, tmp_path):
    with pytest.raises(SystemExit) as ended:
        zo_suite.main([*options, "--folder", str(tmp_path)])
    assert str(ended.value).startswith(words)
