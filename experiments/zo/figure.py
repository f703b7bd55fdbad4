"""The figures of a fine-tuning run, and of a comparison of recipes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from eggroll.experiments.common.run import number
from eggroll.experiments.zo.config import BACKPROP
from eggroll.experiments.zo.problem import Score
from eggroll.experiments.zo.studies import RECIPES

Row = dict[str, Any]


class Curve(NamedTuple):
    """Validation scores of a seed."""

    what: str  # is scored
    forwards: Sequence[float]
    seconds: Sequence[float]
    values: Sequence[float]  # NaN where a score was not finite


def as_row(score: Score) -> Row:
    """Validation scores as fields of a line of metrics."""
    return {"validation_loss": score.loss, "validation_accuracy": score.accuracy}


def draw_run(rows: Sequence[Row], before: Score, path: Path, *, forwards: int) -> None:
    """Draw training loss, validation loss and validation accuracy against forwards.

    Args:
        rows: of `read_metrics`.
        before: of the validation examples, before training.
        path: PNG file to write.
        forwards: of a step.
    """
    figure = Figure(figsize=(7, 6), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True)
    at = [(row["generation"] + 1) * forwards for row in rows]
    top.plot(at, [_loss(row) for row in rows], color="tab:blue", alpha=0.4, linewidth=0.8, label="objective, training batches")
    checked = [(x, row) for x, row in zip(at, rows, strict=True) if "validation_accuracy" in row]
    where = [0, *(x for x, _ in checked)]
    losses, accuracies = ([number(row[f"validation_{name}"]) for _, row in checked] for name in Score._fields)
    top.plot(where, [before.loss, *losses], "o-", color="tab:orange", label="validation loss")
    bottom.plot(where, [before.accuracy, *accuracies], "o-", color="tab:green")
    top.set(ylabel="loss")
    top.legend()
    bottom.set(xlabel="forwards of a batch", ylabel="validation accuracy")
    figure.savefig(path, dpi=120)


def draw_curves(curves: Mapping[str, Mapping[str, Sequence[Curve]]], path: Path) -> None:
    """Draw validation scores against forwards and against seconds, mean over seeds with their range.

    Args:
        curves: study -> recipe -> curves of its seeds, all with checks at the same forwards.
        path: PNG file to write.
    """
    figure = Figure(figsize=(11, 3.6 * len(curves)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(curves), 2, sharey="row", squeeze=False)
    for (study, recipes), (left, right) in zip(curves.items(), panels, strict=True):
        for recipe, seeds in recipes.items():
            values = np.array([curve.values for curve in seeds])
            index = list(RECIPES).index(recipe)
            color, linestyle = ("black", "--") if recipe == BACKPROP else (f"C{index}", "-")
            for axes, at in ((left, seeds[0].forwards), (right, np.mean([curve.seconds for curve in seeds], axis=0))):
                axes.plot(at, values.mean(axis=0), label=recipe, color=color, linestyle=linestyle)
                axes.fill_between(at, values.min(axis=0), values.max(axis=0), alpha=0.15, color=color)
        what = next(iter(recipes.values()))[0].what
        left.set(title=study, ylabel=what, xlabel="forwards of a batch (backward passes of adam not counted)")
        right.set(title=study, xlabel="seconds of training steps, without compilation; range over seeds")
        for axes in (left, right):
            axes.grid(alpha=0.3)
        left.legend(frameon=False)
    figure.savefig(path, dpi=110)


def _loss(row: Row) -> float:
    """The loss that a step reported; the engine's fitness is minus it."""
    return number(row["loss"]) if "loss" in row else -number(row["mean_fitness"])
