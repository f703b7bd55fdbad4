"""Compare recipes of zeroth-order fine-tuning at equal forward budget: `python -m eggroll.experiments.zo_suite --help`.

Each recipe runs `experiments.zo` (`experiments.common.suite`), on the small model and the shipped task unless options say
otherwise; `adam` is backprop with as many steps as MeZO takes with one direction. The figure, `curves.png`, has the validation
accuracies. The last line of standard output is a JSON object.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from eggroll.experiments.common.bootstrap import mean_interval
from eggroll.experiments.common.options import check_passed, drop_options, effective
from eggroll.experiments.common.run import run_folder
from eggroll.experiments.common.seed_runs import Setting, search
from eggroll.experiments.common.suite import Report, Result, Suite, markdown_table, one_job_each, run_suite
from eggroll.experiments.zo.config import BACKPROP, RECIPES, RULES, parse
from eggroll.experiments.zo.config import Config as ZOConfig
from eggroll.experiments.zo.figure import Curve, draw_curves
from eggroll.experiments.zo.memory import step_mib
from eggroll.experiments.zo.warm_start import warm_start
from eggroll.runs.metrics import read_metrics

MODULE = "eggroll.experiments.zo"
OWN = ("recipe", "steps", "seed")
SEARCH_SEED = 100
FACTORS = (1 / 3, 1.0, 3.0)  # of the default step size, that --search tries


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare recipes at equal forward budget. Other options go to those runs of experiments.zo that read them."""

    recipes: tuple[str, ...] = RECIPES
    """Recipes of experiments.zo."""
    seeds: int = 3
    """Seeds 0, 1, ... of every recipe."""
    forwards: int = 40_000
    """Forward passes of a batch for every recipe; adam takes half as many steps."""
    search: bool = False
    """First try a third, once and three times the default step size with seed 100; the lowest validation loss wins."""
    folder: Path = Path("runs/zo-suite")
    """Folder of all results; an interrupted suite resumes from it."""


class Row(NamedTuple):
    """One recipe."""

    recipe: str
    setting: str
    seeds: int
    test_accuracy: float  # mean over seeds
    low: float  # 95 % bootstrap interval over seeds
    high: float
    below_backprop: float  # NaN without a row of backprop
    test_accuracy_before: float
    train_loss: float  # mean over seeds, of unperturbed parameters on training examples
    steps: int
    forwards: int
    seconds: float  # mean over seeds, of training
    forwards_per_second: float  # median over seeds
    step_mib: float
    peak_mib: int  # of the process that ran the seeds
    accuracies: tuple[float, ...]  # of the seeds


def make_suite(config: Config, options: Sequence[str]) -> Suite:
    """Make the suite, and the small model if recipes start from it.

    Raises:
        ValueError, OSError, ModuleNotFoundError: an option is wrong, a file or a package is missing.
    """
    if config.seeds < 1:
        raise ValueError(f"seeds must be an integer >= 1, got {config.seeds}.")
    ignored = [parse(("--recipe", recipe, *options, *_resume(recipe))).ignored() for recipe in config.recipes]
    check_passed(options, own=OWN, ignored=ignored)
    config = dataclasses.replace(config, folder=run_folder(config.folder))
    settings = [make_setting(config, recipe, options) for recipe in config.recipes]
    first = parse(settings[0].arguments)
    if first.model is None:
        warm_start(first.start)  # now, so that no recipe's seconds contain it
    memory: dict[str, float] = {}  # recipe -> MiB of a step

    def choose(setting: Setting) -> Setting:
        if config.search:
            tries = search_settings(config, setting.labels[0], options)
            best = search(MODULE, tries, seed=SEARCH_SEED, score=_negative_loss)
            setting = dataclasses.replace(best, folder=setting.folder)
        memory[setting.name] = step_mib(setting.arguments, config.folder / "memory")
        return setting

    return Suite(
        MODULE,
        config.folder,
        one_job_each(settings, range(config.seeds)),
        report=lambda results: report(config.folder, results, memory=memory),
        choose=choose,
    )


def make_setting(config: Config, recipe: str, options: Sequence[str], *, rate: float | None = None) -> Setting:
    """Make the setting of a recipe, with its default step size or the one given, without options that have no effect in it.

    Raises:
        ValueError: an option is wrong.
    """
    budget = ("--steps", str(config.forwards // 2)) if recipe == BACKPROP else ("--forwards", str(config.forwards))
    learning_rate = () if rate is None else ("--learning-rate", f"{rate:.3g}")
    arguments = ("--recipe", recipe, *budget, *learning_rate, *options, *_resume(recipe))
    arguments = drop_options(arguments, parse(arguments).ignored())
    parsed = parse(arguments)
    parsed.check()
    return Setting((recipe,), arguments, effective(parsed.settings(), parsed, RULES), config.folder / recipe)


def _resume(recipe: str) -> tuple[str, ...]:
    """What makes a seed that was killed continue."""
    return () if recipe == BACKPROP else ("--resume",)


def search_settings(config: Config, recipe: str, options: Sequence[str]) -> list[Setting]:
    """Return settings with step sizes around the default of a recipe; ValueError if it has none."""
    default = parse(("--recipe", recipe, *options)).learning_rate
    if default is None:
        raise ValueError(f"no step size of {recipe} is known, around which to search")
    tries = []
    for factor in FACTORS:
        setting = make_setting(config, recipe, options, rate=factor * default)
        tries.append(dataclasses.replace(setting, folder=setting.folder / f"search-{factor:.2g}"))
    return tries


def _negative_loss(summary: Mapping[str, Any]) -> float | None:
    return None if summary["validation_loss"] is None else -summary["validation_loss"]


def report(folder: Path, results: Sequence[Result], *, memory: Mapping[str, float]) -> Report:
    """Draw the validation accuracies; return table and numbers. `memory` has the MiB of a step of each recipe."""
    found = {setting.name: list(summaries.values()) for setting, summaries in results}
    ceiling = statistics.fmean(s["test_accuracy"] for s in found[BACKPROP]) if BACKPROP in found else float("nan")
    rows, curves = list[Row](), dict[str, list[Curve]]()
    for setting, summaries in results:
        recipe = setting.name
        row = make_row(parse(setting.arguments), found[recipe], ceiling=ceiling, step_mib=memory[recipe])
        forwards = row.forwards // row.steps
        curves[recipe] = [read_curve(setting.folder / f"seed-{seed}", forwards=forwards) for seed in summaries]
        rows.append(row)
    if rows:
        draw_curves(curves, folder / "curves.png")
    return Report(make_table(rows), {"rows": [row._asdict() for row in rows]})


def read_curve(folder: Path, *, forwards: int) -> Curve:
    """Read the checks of a run: forwards, `forwards` a step, and validation accuracies."""
    rows = [row for row in read_metrics(folder) if row.get("validation_accuracy") is not None]
    return [(row["generation"] + 1) * forwards for row in rows], [row["validation_accuracy"] for row in rows]


def make_row(config: ZOConfig, summaries: Sequence[Mapping[str, Any]], *, ceiling: float, step_mib: float) -> Row:
    """Make a row from the summaries of its seeds; `ceiling` is the mean test accuracy of backprop."""
    accuracies = tuple(s["test_accuracy"] for s in summaries)
    low, high = mean_interval(accuracies)
    return Row(
        config.recipe,
        describe(config),
        seeds=len(summaries),
        test_accuracy=statistics.fmean(accuracies),
        low=low,
        high=high,
        below_backprop=ceiling - statistics.fmean(accuracies),
        test_accuracy_before=statistics.fmean(s["test_accuracy_before"] for s in summaries),
        train_loss=statistics.fmean(s["train_loss"] for s in summaries),
        steps=summaries[0]["steps"],
        forwards=summaries[0]["forwards"],
        seconds=statistics.fmean(s["seconds"] for s in summaries),
        forwards_per_second=statistics.median(s["forwards_per_second"] for s in summaries),
        step_mib=step_mib,
        peak_mib=max(s["peak_mib"] for s in summaries),
        accuracies=accuracies,
    )


def describe(config: ZOConfig) -> str:
    """Return the settings of a recipe that are not its defaults."""
    numbers = {"n": config.directions, "sigma": config.sigma, "rate": config.learning_rate}
    return " ".join([f"{name}={value:g}" for name, value in numbers.items() if value is not None] + list(config.options))


def make_table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    head = ["recipe", "setting", "test accuracy [95 % interval]", "below adam", "before", "train loss", "seeds", "steps"]
    head += ["forwards", "seconds", "forwards / s", "step MiB", "peak MiB"]
    cells = []
    for row in rows:
        accuracy = f"{row.test_accuracy:.3f} [{row.low:.3f}, {row.high:.3f}]"
        cells.append([row.recipe, row.setting, accuracy, f"{row.below_backprop:.3f}", f"{row.test_accuracy_before:.3f}"])
        cells[-1] += [f"{row.train_loss:.3f}", str(row.seeds), f"{row.steps:,}", f"{row.forwards:,}", f"{row.seconds:.0f}"]
        cells[-1] += [f"{row.forwards_per_second:.0f}", f"{row.step_mib:.1f}", f"{row.peak_mib:,}"]
    return markdown_table(head, cells)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line; wrong options end it with a one-line error."""
    config, options = tyro.cli(Config, args=arguments, prog="python -m eggroll.experiments.zo_suite", return_unknown_args=True)
    run_suite(lambda: make_suite(config, options))


if __name__ == "__main__":
    main()
