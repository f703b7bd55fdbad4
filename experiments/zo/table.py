"""The table of a comparison of recipes, and what its figure draws."""

import itertools
import math
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eggroll.experiments.common.bootstrap import mean_interval
from eggroll.experiments.common.run import SUMMARY, finite_median, number
from eggroll.experiments.common.suite import Report, Result, markdown_table
from eggroll.experiments.zo.config import BACKPROP, parse
from eggroll.experiments.zo.config import Config as ZOConfig
from eggroll.experiments.zo.figure import Curve, draw_curves
from eggroll.runs.metrics import read_metrics

ZERO_SHOT = "zero-shot"
LARGE = ("model", "checkpoints")  # what a finished run of a real model need not keep
Tries = dict[float, float | None]  # step size -> validation score
Summaries = Sequence[Mapping[str, Any]]


class Row(NamedTuple):
    """One recipe of a study, or the model without training."""

    study: str
    recipe: str
    setting: str
    accuracies: tuple[float, ...]  # on test examples, of the seeds
    losses: tuple[float, ...]
    test_accuracy: float  # means over seeds, with 95 % bootstrap intervals
    accuracy_interval: tuple[float, float]
    test_loss: float
    loss_interval: tuple[float, float]
    below_backprop: float  # in accuracy; NaN without a row of backprop
    steps: int = 0
    forwards: int = 0
    seconds: float = 0.0  # mean over seeds, of training with compilation
    forwards_per_second: float = math.nan  # of the median step; median over seeds
    peak_mib: int | None = None  # of the process that ran the seeds
    tries: Tries | None = None


def report(folder: Path, results: Sequence[Result], *, tries: Mapping[str, Tries], keep_models: bool) -> Report:
    """Draw the curves; return table and numbers.

    Args:
        folder: of the suite.
        results: of the recipes that are finished.
        tries: name of a setting -> the step sizes that were tried.
        keep_models: otherwise the tuned models of finished runs are removed: a real one takes half a gigabyte a seed.
    """
    found: dict[str, dict[str, Result]] = {}
    for result in results:
        study, recipe = result.setting.labels
        found.setdefault(study, {})[recipe] = result
        if not keep_models:
            remove_models(result.setting.folder)
    rows = list(itertools.chain.from_iterable(_study_rows(study, recipes, tries) for study, recipes in found.items()))
    curves = {study: {recipe: _curves(*result) for recipe, result in recipes.items()} for study, recipes in found.items()}
    if curves:
        draw_curves(curves, folder / "curves.png")
    return Report(make_table(rows), {"rows": [row._asdict() for row in rows]})


def remove_models(folder: Path) -> None:
    """Remove the models and checkpoints of the finished runs below a folder; others continue from theirs."""
    for path in folder.rglob("seed-*"):
        for name in LARGE if (path / SUMMARY).is_file() else ():
            shutil.rmtree(path / name, ignore_errors=True)


def _study_rows(study: str, recipes: Mapping[str, Result], tries: Mapping[str, Tries]) -> list[Row]:
    summaries = {recipe: list(result.summaries.values()) for recipe, result in recipes.items()}
    ceiling = statistics.fmean(number(s["test_accuracy"]) for s in summaries[BACKPROP]) if BACKPROP in summaries else math.nan
    rows = [make_row(study, ZERO_SHOT, "", next(iter(summaries.values()))[:1], ceiling=ceiling, suffix="_before")]
    for recipe, (setting, _) in recipes.items():
        of_recipe = summaries[recipe]
        row = make_row(study, recipe, describe(parse(setting.arguments)), of_recipe, ceiling=ceiling)
        rows.append(
            row._replace(
                steps=of_recipe[0]["steps"],
                forwards=of_recipe[0]["forwards"],
                seconds=statistics.fmean(s["seconds"] for s in of_recipe),
                forwards_per_second=finite_median(s["forwards_per_second"] for s in of_recipe),
                peak_mib=max(s["peak_mib"] for s in of_recipe),
                tries=tries.get(setting.name),
            )
        )
    return rows


def make_row(study: str, recipe: str, setting: str, summaries: Summaries, *, ceiling: float, suffix: str = "") -> Row:
    """Make the row of some scores.

    Args:
        study, recipe, setting: names.
        summaries: of the seeds.
        ceiling: mean test accuracy of backprop.
        suffix: "_before" for the scores before training.
    """
    accuracies, losses = (tuple(number(s[f"test_{name}{suffix}"]) for s in summaries) for name in ("accuracy", "loss"))
    means = statistics.fmean(accuracies), statistics.fmean(losses)
    intervals = mean_interval(accuracies), mean_interval(losses)
    return Row(study, recipe, setting, accuracies, losses, means[0], intervals[0], means[1], intervals[1], ceiling - means[0])


def describe(config: ZOConfig) -> str:
    """Return the settings of a recipe that are not its defaults."""
    numbers = {"n": config.directions, "sigma": config.sigma, "rate": config.learning_rate}
    return " ".join([f"{name}={value:.3g}" for name, value in numbers.items() if value is not None] + list(config.options))


def _curves(setting: Any, summaries: Mapping[int, Mapping[str, Any]]) -> list[Curve]:
    what = "validation_accuracy" if setting.options["objective"] == "accuracy" else "validation_loss"
    return [read_curve(setting.folder / f"seed-{seed}", summary, what=what) for seed, summary in summaries.items()]


def read_curve(folder: Path, summary: Mapping[str, Any], *, what: str) -> Curve:
    """Read the checks of a run; a step takes its median seconds, so that compilation does not count."""
    rows = read_metrics(folder)
    of_step = finite_median(row["seconds"] for row in rows)
    checked = [row for row in rows if what in row]
    steps = [0, *(row["generation"] + 1 for row in checked)]
    forwards = summary["forwards"] // summary["steps"]
    values = [number(summary[f"{what}_before"]), *(number(row[what]) for row in checked)]
    return Curve(what.replace("_", " "), [n * forwards for n in steps], [n * of_step for n in steps], values)


def make_table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    head = ["study", "recipe", "setting", "test accuracy [95 % interval]", "test loss [95 % interval]", "below adam", "seeds"]
    head += ["steps", "forwards", "seconds", "forwards / s", "peak MiB", "rates tried: validation score"]
    cells = []
    for row in rows:
        accuracy, loss = _interval(row.test_accuracy, row.accuracy_interval), _interval(row.test_loss, row.loss_interval)
        cells.append([row.study, row.recipe, row.setting, accuracy, loss, _number(row.below_backprop)])
        if row.recipe == ZERO_SHOT:
            cells[-1] += [""] * 7
            continue
        tried = ", ".join(f"{rate:.2g}: {'-' if s is None else f'{s:.3f}'}" for rate, s in (row.tries or {}).items())
        cells[-1] += [str(len(row.accuracies)), f"{row.steps:,}", f"{row.forwards:,}", f"{row.seconds:.0f}"]
        cells[-1] += [_number(row.forwards_per_second, ".3g"), f"{row.peak_mib:,}", tried]
    return markdown_table(head, cells)


def _interval(mean: float, interval: tuple[float, float]) -> str:
    return f"{mean:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]" if interval[1] > interval[0] else _number(mean)


def _number(value: float, how: str = ".3f") -> str:
    return f"{value:{how}}" if math.isfinite(value) else "-"
