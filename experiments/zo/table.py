"""Rows of the comparison, the table, and the figure."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from eggroll.experiments.rl.table import interval
from eggroll.experiments.zo.config import BACKPROP, Config

Curves = Sequence[tuple[Sequence[float], Sequence[float]]]  # of the seeds: forwards and validation accuracy


class Row(NamedTuple):
    """One recipe."""

    recipe: str
    setting: str
    seeds: int
    test_accuracy: float  # mean over seeds
    low: float  # 95 % bootstrap interval over seeds
    high: float
    below_backprop: float  # NaN where backprop is not there
    test_accuracy_before: float
    train_loss: float  # mean over seeds, of unperturbed parameters on training examples
    steps: int
    forwards: int
    seconds: float  # mean over seeds, of training
    forwards_per_second: float  # median over seeds
    step_mib: float
    peak_mib: int  # of the process that ran the seeds
    accuracies: tuple[float, ...]  # of the seeds


def setting_of(config: Config) -> str:
    """What was chosen for a recipe, in words."""
    names = {"directions": "n", "sigma": "sigma", "learning_rate": "rate"}
    known = {short: getattr(config, name) for name, short in names.items()}
    return " ".join([f"{short}={value:g}" for short, value in known.items() if value is not None] + list(config.options))


def make_row(config: Config, summaries: Sequence[Mapping[str, Any]], *, ceiling: float, step_mib: float) -> Row:
    """Make a row of the summaries of its seeds; `ceiling` is the mean test accuracy of backprop."""
    accuracies = tuple(s["test_accuracy"] for s in summaries)
    mean = {name: statistics.fmean(s[name] for s in summaries) for name in ("train_loss", "seconds", "test_accuracy_before")}
    return Row(
        config.recipe,
        setting_of(config),
        len(summaries),
        statistics.fmean(accuracies),
        *interval(accuracies),
        ceiling - statistics.fmean(accuracies),
        mean["test_accuracy_before"],
        mean["train_loss"],
        summaries[0]["steps"],
        summaries[0]["forwards"],
        mean["seconds"],
        statistics.median(s["forwards_per_second"] for s in summaries),
        step_mib,
        max(s["peak_mib"] for s in summaries),
        accuracies,
    )


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    head = ["recipe", "setting", "test accuracy [95 % interval]", "below adam", "before", "train loss", "seeds", "steps"]
    head += ["forwards", "seconds", "forwards / s", "step MiB", "peak MiB"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        accuracy = f"{row.test_accuracy:.3f} [{row.low:.3f}, {row.high:.3f}]"
        cells = [row.recipe, row.setting, accuracy, f"{row.below_backprop:.3f}", f"{row.test_accuracy_before:.3f}"]
        cells += [f"{row.train_loss:.3f}", str(row.seeds), f"{row.steps:,}", f"{row.forwards:,}", f"{row.seconds:.0f}"]
        cells += [f"{row.forwards_per_second:.0f}", f"{row.step_mib:.1f}", f"{row.peak_mib:,}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw_curves(curves: Mapping[str, Curves], path: Path) -> None:
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
        style: dict[str, Any] = {"color": "black", "linestyle": "--"} if recipe == BACKPROP else {"color": f"C{index}"}
        axes.plot(forwards, values.mean(axis=0), label=recipe, **style)
        axes.fill_between(forwards, values.min(axis=0), values.max(axis=0), alpha=0.15, color=style["color"])
    axes.set(xlabel="forwards of a batch (backward passes of adam not counted)", ylabel="validation accuracy, range over seeds")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
