"""`--evaluate`: scores of a model, or of the last and the best parameters of a finished run, without training."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from eggroll.devices.processes import is_first
from eggroll.experiments.common.contents import check_contents
from eggroll.experiments.common.finished import read_run
from eggroll.experiments.common.options import ignored_options, refuse, unless
from eggroll.experiments.common.run import SUMMARY
from eggroll.experiments.common.seeds import MODEL
from eggroll.experiments.zo.config import BACKPROP, Config, config_from, small_defaults
from eggroll.experiments.zo.data.examples import Examples
from eggroll.experiments.zo.evolution import Evolution
from eggroll.experiments.zo.inputs import Loaded, load, read_contents, where
from eggroll.experiments.zo.problem import Score, score
from eggroll.experiments.zo.progress import words
from eggroll.llm import hf
from eggroll.runs.metrics import read_metrics

Row = dict[str, Any]


def score_parts(judged: Callable[[Examples], tuple[Any, Any]], parts: Mapping[str, Examples]) -> dict[str, Score]:
    """Score the examples of every part; `judged` maps a batch to its mean loss and accuracy."""
    return {name: score(judged, examples) for name, examples in parts.items()}


def score_fields(scores: Mapping[str, Score], suffix: str = "") -> Row:
    """Scores as fields of a summary, such as `test_accuracy`."""
    return {f"{name}_{what}{suffix}": value for name, found in scores.items() for what, value in found._asdict().items()}


def evaluate(config: Config) -> Row:
    """Score on the validation and the test examples, and print the scores.

    Args:
        config: with the folder of a finished run, whose own options count except for `data`; without one, of a model.

    Raises:
        ValueError, OSError: there is no finished run in the folder, it was made with another option than one that is given, its
            data have changed, or a file is missing or damaged.
    """
    summary = None
    if config.folder is not None:
        config, summary = _of_run(config, config.folder)
    loaded = load(config)
    judge, parts = loaded.task.judge(), {"validation": loaded.task.validation, "test": loaded.task.test}
    judge_of = Evolution(config, loaded.task, judge).judge if config.offload else functools.partial(functools.partial, judge)

    def scores(name: str, params: Any) -> dict[str, Score]:
        found = score_parts(judge_of(params), parts)
        if is_first():
            print(f"{name}: {', '.join(f'{part} {words(score)}' for part, score in found.items())}", flush=True)
        return found

    if summary is None:
        name = str(config.model or "the small model")
        return {"model": name, **score_fields(scores(name, loaded.params))}
    assert config.folder is not None
    steps, best = summary["steps"], best_step(read_metrics(config.folder), summary, by=config.objective)
    dtype = config.dtype if config.model else "float32"
    row = {"folder": str(config.folder), "steps": steps}
    loaded.read()  # and dropped: parameters that nothing needs yet
    with where(config):
        tuned = hf.load(config.folder / MODEL, dtype)[2]
    row |= score_fields(last := scores(f"last, step {steps}", tuned))
    if config.recipe == BACKPROP and 0 < best < steps:
        return row  # it keeps no journal
    row["best_step"] = best
    if best == steps:
        return row | score_fields(last, "_best")
    return row | score_fields(scores(f"best, step {best}", _parameters(config, loaded, best)), "_best")


def _of_run(config: Config, folder: Path) -> tuple[Config, Row]:
    """Return the options and the summary of the finished run in a folder; options that say something else are refused."""
    found = read_run(folder, experiment="zo", names=("recipe", "objective"))
    folder = found.folder
    if found.summary is None:
        raise ValueError(f"the run in {folder} is not finished: it has no {SUMMARY}. Finish it with --resume.")
    if not (folder / MODEL).is_dir():
        raise ValueError(
            f"{folder} has no {MODEL}: it was removed, as a comparison of recipes does. Its scores are in {SUMMARY}."
        )
    own = dataclasses.replace(config_from(found.options), seed=found.seed)
    fixed = unless(
        lambda _: True,
        f"with --evaluate of {folder}, whose own options count",
        "seed",
        "seeds",
        *own.settings().keys() - {"data"},
    )
    refuse(ignored_options(config, (fixed,), Config(), small_defaults(config), own))
    if config.data in (None, own.data):
        advice = "restore it, or score other data by --data with another path"
        check_contents(found.options.get("contents"), read_contents(own.data), advice=advice)
    return dataclasses.replace(own, folder=folder, evaluate=True, data=config.data or own.data), found.summary


def best_step(rows: list[Row], summary: Row, *, by: str) -> int:
    """Return the step with the best validation score; 0 is the start, and the last of equals wins.

    Args:
        rows: of `metrics.jsonl`.
        summary: of the run.
        by: the objective, "loss" or "accuracy".
    """
    sign, name = (-1, "validation_loss") if by == "loss" else (1, "validation_accuracy")
    found = [(sign * row[name], row["generation"] + 1) for row in rows if row.get(name) is not None]
    start = summary.get(f"{name}_before")
    return max([*found, *([] if start is None else [(sign * start, 0)])], default=(0, summary["steps"]))[1]


def _parameters(config: Config, loaded: Loaded, step: int) -> Any:
    """Return the parameters of a run after a step, from its journal."""
    if not step:
        return loaded.params
    assert config.folder is not None
    evolution = Evolution(config, loaded.task, loaded.task.judge())
    return evolution.rebuild(loaded.read, step, key=jax.random.key(config.seed), folder=config.folder)
