"""The comparison of recipes: its studies and rows, what it runs and what not, and what it refuses."""

import dataclasses
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from eggroll.experiments.common.seed_runs import Setting
from eggroll.experiments.common.suite import Result
from eggroll.experiments.zo import studies
from eggroll.experiments.zo import suite as zo_suite
from eggroll.experiments.zo.data import movies
from eggroll.experiments.zo.figure import draw_run
from eggroll.experiments.zo.problem import Score
from eggroll.experiments.zo.table import Row, make_table, report
from eggroll.runs.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("standard_promotion")  # optax.adam relies on it
TINY = ["--start.steps", "0", "--start.width", "16", "--start.layers", "1", "--batch-size", "2", "--checks", "2"]


def summary(accuracy, **more):
    known = {"test_accuracy": accuracy, "test_accuracy_before": 0.5, "test_loss": 0.25, "test_loss_before": 0.75, "steps": 10}
    return known | {"seconds": 2.0, "forwards": 20, "forwards_per_second": 10.0, "peak_mib": 100} | more


@pytest.fixture
def results(tmp_path):
    """Two seeds of lozo and one of adam, with curves and models in their folders."""

    def result(recipe, arguments, summaries):
        folder = tmp_path / "movies" / recipe
        for seed, found in summaries.items():
            place = folder / f"seed-{seed}"
            (place / "model").mkdir(parents=True)
            (place / "summary.json").write_text("{}")
            found["validation_loss_before"] = 1.0
            steps = [{"generation": n, "seconds": 9.0 if n == 0 else 1.0, "mean_fitness": None} for n in range(4)]
            for n, loss in ((0, 0.5), (1, None), (3, 0.5)):  # checks
                steps[n] |= {"validation_loss": loss, "validation_accuracy": 0.5}
            (place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
        options = {"objective": "loss"}
        return Result(Setting(("movies", recipe), ("--recipe", recipe, *arguments), options, folder), summaries)

    lozo = ("--learning-rate", "0.01", "--sigma", "0.001", "--options", "rank=4")
    yield [
        result("lozo", lozo, {0: summary(0.75), 1: summary(0.5, peak_mib=200)}),
        result("adam", ("--learning-rate", "0.01"), {0: summary(1.0)}),
    ]


def test_rows_table_and_figure_of_a_study(results, tmp_path):
    found = report(tmp_path, results, tries={"movies lozo": {0.01: -0.5, 0.03: None}}, keep_models=False)
    zero, lozo, adam = (Row(**row) for row in found.numbers["rows"])
    assert (zero.recipe, zero.test_accuracy, zero.test_loss, zero.below_backprop) == ("zero-shot", 0.5, 0.75, 0.5)
    assert (lozo.test_accuracy, lozo.accuracy_interval, lozo.below_backprop, lozo.peak_mib) == (0.625, (0.5, 0.75), 0.375, 200)
    cells = ["movies", "lozo", "sigma=0.001 rate=0.01 rank=4", "0.625 [0.500, 0.750]", "0.250", "0.375", "2", "10", "20"]
    assert found.table.splitlines()[3] == f"| {' | '.join([*cells, '2', '10', '200', '0.01: -0.500, 0.03: -'])} |"
    assert (tmp_path / "curves.png").exists() and not list(tmp_path.rglob("model"))  # of a real model: half a gigabyte each
    assert make_table([]).count("\n") == 2


def test_curves_begin_before_training_and_leave_compilation_out(results):
    from eggroll.experiments.zo.table import read_curve

    curve = read_curve(results[0].setting.folder / "seed-0", results[0].summaries[0], what="validation_loss")
    np.testing.assert_equal(curve, ("validation loss", [0, 2, 4, 8], [0.0, 1.0, 2.0, 4.0], [1.0, 0.5, np.nan, 0.5]))


def test_a_seed_that_diverged_is_a_dash_and_a_gap(results, tmp_path):
    """Its losses are null in the files; nothing was left of a run that was already finished, so neither is its speed."""
    diverged, adam = results
    diverged.summaries[1].update(test_loss=None, validation_loss_before=None, forwards_per_second=None)
    adam.summaries[0].update(test_accuracy=None, forwards_per_second=None)
    found = report(tmp_path, results, tries={}, keep_models=True)
    rows = [line.split(" | ") for line in found.table.splitlines()[2:]]
    assert [row[4] for row in rows] == ["0.750", "-", "0.250"] and [row[5] for row in rows] == ["-"] * 3
    assert [row[10] for row in rows[1:]] == ["10", "-"] and rows[2][3] == "-"
    draw_run(read_metrics(diverged.setting.folder / "seed-1"), Score(1.0, 0.5), tmp_path / "run.png", forwards=2)


def test_an_unfinished_seed_keeps_what_it_continues_from(results, tmp_path):
    seed = results[0].setting.folder / "seed-1"
    (seed / "summary.json").unlink()
    report(tmp_path, results, tries={}, keep_models=False)
    assert [path.parent for path in tmp_path.rglob("model")] == [seed]


def test_studies_of_a_real_model_share_examples_and_search_without_the_test(tmp_path, monkeypatch):
    """Rates are three for every recipe; backprop is left out where the objective has no gradient."""
    content = "".join(f"{n}\t{rating}\tsentence number {n}\r\n" for n, rating in enumerate([-2.0, 2.0, 0.5] * 10))
    records = movies.parse(content + "31\t3.0\t" + "long " * 13 + "\r\n32\t1.5\tsentence number 1\r\n")
    assert len(records) == 20 and records[:2] == [{"text": f"sentence number {n}", "label": n} for n in (0, 1)]
    monkeypatch.setitem(studies.STUDIES, "movies", studies.STUDIES["movies"]._replace(records=lambda: records))
    monkeypatch.setattr(zo_suite.hf, "check", lambda _: None)
    config = zo_suite.Config(
        tmp_path / "model", ("movies-accuracy", "movies"), 4, 6, ("lozo", "adam"), folder=tmp_path / "suite"
    )
    made = zo_suite.make_suite(config, ["--batch-size", "2"])
    names = [job.name for job in made.jobs]
    assert names[::3] == ["movies-accuracy lozo seed 0", "movies lozo seed 0", "movies adam seed 0"] and len(names) == 9
    setting = made.jobs[-1].setting
    tried = zo_suite.search_settings(config, setting, ["--batch-size", "2"])
    assert list(tried) == pytest.approx([2e-5 / 3, 2e-5, 6e-5]) and len({found.folder for found in tried.values()}) == 3
    lines = {
        folder: {path.stem: path.read_text().splitlines() for path in (tmp_path / "suite" / "data" / folder).iterdir()}
        for folder in ("sentences-4-6", "sentences-4-6-search")
    }
    reported, searched = lines.values()
    assert searched["train"] == reported["train"] and searched["validation"] == reported["validation"]
    assert [len(reported[name]) for name in ("train", "validation", "test")] == [10, 4, 6] and len(searched["test"]) == 1
    assert len({line for part in reported.values() for line in part}) == 20
    assert "sentences-4-6-search" in " ".join(next(iter(tried.values())).arguments)
    short = zo_suite.make_suite(config, ["--batch-size", "2", "--dtype", "bfloat16"]).jobs[0].setting
    assert short.options["dtype"] == "bfloat16"
    with pytest.raises(ValueError, match="validation and test must be at least 1 and less than 20 in sum, got 4, 16"):
        zo_suite.make_suite(dataclasses.replace(config, test=16), [])
    scored = {"validation_loss": 0.5, "validation_accuracy": 0.75}
    of = [SimpleNamespace(options={"objective": name}) for name in ("loss", "accuracy")]
    assert [zo_suite.score(setting, scored) for setting in of] == [-0.5, 0.75]
    assert zo_suite.score(of[0], scored | {"validation_loss": None}) is None


def test_a_search_that_failed_is_not_repeated(tmp_path, monkeypatch):
    runs = []

    def fails(*_, **__):
        runs.append(1)
        raise RuntimeError("no run of the search has a finite score")

    monkeypatch.setattr(zo_suite, "search", fails)
    monkeypatch.setattr(zo_suite, "warm_start", lambda _: None)
    made = zo_suite.make_suite(zo_suite.Config(recipes=("lozo",), folder=tmp_path), TINY)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no run of the search"):
            made.choose(made.jobs[0].setting)
    assert len(runs) == 1


@pytest.mark.slow
def test_a_suite_searches_and_runs_what_is_missing(capsys, tmp_path, monkeypatch):
    """Every recipe sees as many forwards; the second start finds everything."""
    monkeypatch.chdir(tmp_path)
    options = ["--recipes", "mezo-rademacher", "adam", "--seeds", "2", "--forwards", "8", "--folder", "out/suite", *TINY]
    zo_suite.main(options)
    out = capsys.readouterr().out.splitlines()
    first = json.loads(out[-1])
    assert first["failed"] == {} and [(row["recipe"], row["steps"], row["forwards"]) for row in first["rows"]] == [
        ("zero-shot", 0, 0),
        ("mezo-rademacher", 4, 8),
        ("adam", 4, 4),
    ]
    assert sum(line.startswith("  --recipe mezo") for line in out) == 3 and len(first["rows"][1]["tries"]) == 3
    assert first["rows"][1]["below_backprop"] == pytest.approx(
        first["rows"][2]["test_accuracy"] - first["rows"][1]["test_accuracy"]
    )
    for name in ("table.md", "curves.png", "results.json", "small/mezo-rademacher/seed-1/model/config.json"):
        assert (tmp_path / "out" / "suite" / name).exists(), name
    monkeypatch.setattr(sys, "executable", "false")  # nothing can be run any more
    zo_suite.main(options)
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["rows"] == first["rows"]
    with pytest.raises(SystemExit):
        zo_suite.main([*options, "--batch-size", "3"])
    failed = json.loads(capsys.readouterr().out.splitlines()[-1])["failed"]
    assert "has a run with another batch_size; choose another folder." in failed["small mezo-rademacher"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seeds", "0"], "error: seeds must be an integer >= 1, got 0."),
        (["--recipes", "meso"], "error: recipes must be out of mezo, "),
        (["--model", "x", "--studies", "sst"], "error: studies must be out of movies, movies-accuracy, sums, got sst."),
        (["--learning-rate", "1e-4"], "error: --learning-rate cannot be given to a suite, which sets it for every run."),
        (["--model", "x"], "error: model must be a folder with a checkpoint, got x."),
        (["--model", "x", "--start.width", "64"], "error: --start.width has no effect with --model: it is of the small model"),
        (["--sigma", "-1", "--recipes", "mezo"], "error: sigma must be a finite number > 0, got -1.0."),
    ],
)
def test_bad_options_end_with_a_clear_error(options, words, tmp_path):
    with pytest.raises(SystemExit) as ended:
        zo_suite.main([*options, "--folder", str(tmp_path)])
    assert str(ended.value).startswith(words)
