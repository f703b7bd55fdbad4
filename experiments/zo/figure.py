"""The figure of a fine-tuning run."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from eggroll.experiments.common.loop import Row
from eggroll.experiments.zo.problem import Score


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


def _loss(row: Row) -> float:
    """The loss that a step reported; the engine's fitness is minus it."""
    sign, value = (1, row["loss"]) if "loss" in row else (-1, row["mean_fitness"])
    return math.nan if value is None else sign * value
