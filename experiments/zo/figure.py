"""The figures of a fine-tuning run, and of a comparison of recipes."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from eggroll.experiments.zo.config import BACKPROP
from eggroll.experiments.zo.problem import Score

Row = dict[str, Any]
Curve = tuple[Sequence[float], Sequence[float]]  # forwards and validation accuracies of a seed


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
    checked = [(x, row) for x, row in zip(at, rows, strict=True) if row.get("validation_accuracy") is not None]
    where = [0, *(x for x, _ in checked)]
    losses, accuracies = ([row[f"validation_{name}"] for _, row in checked] for name in Score._fields)
    top.plot(where, [before.loss, *losses], "o-", color="tab:orange", label="validation loss")
    bottom.plot(where, [before.accuracy, *accuracies], "o-", color="tab:green")
    top.set(ylabel="loss")
    top.legend()
    bottom.set(xlabel="forwards of a batch", ylabel="validation accuracy")
    figure.savefig(path, dpi=120)


def draw_curves(curves: Mapping[str, Sequence[Curve]], path: Path) -> None:
    """Draw validation accuracy against forwards, mean over seeds with their range.

    Args:
        curves: recipe -> curves of its seeds, all with checks at the same forwards.
        path: PNG file to write.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for index, (recipe, of_seeds) in enumerate(curves.items()):
        forwards, values = of_seeds[0][0], np.array([accuracies for _, accuracies in of_seeds])
        color, linestyle = ("black", "--") if recipe == BACKPROP else (f"C{index}", "-")
        axes.plot(forwards, values.mean(axis=0), label=recipe, color=color, linestyle=linestyle)
        axes.fill_between(forwards, values.min(axis=0), values.max(axis=0), alpha=0.15, color=color)
    axes.set(xlabel="forwards of a batch (backward passes of adam not counted)", ylabel="validation accuracy, range over seeds")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def _loss(row: Row) -> float:
    """The loss that a step reported; the engine's fitness is minus it."""
    sign, value = (1, row["loss"]) if "loss" in row else (-1, row["mean_fitness"])
    return math.nan if value is None else sign * value
