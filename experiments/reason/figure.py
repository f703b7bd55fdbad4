"""The pictures of reasoning: accuracy on validation problems against seconds of training, of a run and of a comparison."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from eggroll.runs.metrics import read_metrics

LABELS = {"eggroll": "EGGROLL", "int8": "EGGROLL, int8", "grpo": "GRPO"}
COLORS = {"eggroll": "#0072b2", "int8": "#009e73", "grpo": "#d55e00"}  # told apart by the colour-blind
Curve = tuple[Sequence[float], Sequence[float]]  # seconds and validation accuracies of a seed


def draw(folder: Path) -> None:
    """Draw `curves.png` from the folder's `metrics.jsonl`."""
    rows = read_metrics(folder)
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    trained = [row for row in rows if row.get("mean_fitness") is not None]
    seconds, rewards = ([row[name] for row in trained] for name in ("seconds_spent", "mean_fitness"))
    axes.plot(seconds, rewards, color="tab:blue", alpha=0.5, linewidth=0.9, label="reward in training")
    checked = [row for row in rows if row.get("validation_accuracy") is not None]
    at, accuracies = ([row[name] for row in checked] for name in ("seconds_spent", "validation_accuracy"))
    axes.plot(at, accuracies, "o-", color="tab:orange", label="validation, unperturbed parameters")
    axes.set(xlabel="seconds of training", ylabel="score")
    axes.legend()
    figure.savefig(folder / "curves.png", dpi=120)


def draw_curves(curves: Mapping[str, Mapping[str, Sequence[Curve]]], path: Path) -> None:
    """Draw a panel for every model: a thin line for every seed, a thick one for their mean where all of them have values.

    Args:
        curves: model -> algorithm -> curves of its seeds, from second 0 on.
        path: PNG file to write.
    """
    figure = Figure(figsize=(5 * len(curves), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(curves), squeeze=False, sharey=True)[0]
    for panel, (model, of_algorithms) in zip(panels, curves.items(), strict=True):
        for algorithm, of_seeds in of_algorithms.items():
            _draw(panel, algorithm, of_seeds)
        panel.set(title=model, xlabel="seconds of training")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("validation accuracy, greedy, unperturbed")
    panels[0].legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=110)


def _draw(panel: Axes, algorithm: str, curves: Sequence[Curve]) -> None:
    for seconds, accuracies in curves:
        panel.plot(seconds, accuracies, color=COLORS[algorithm], alpha=0.35, linewidth=0.8)
    grid = np.linspace(0, min(seconds[-1] for seconds, _ in curves), 60)
    mean = np.mean([np.interp(grid, seconds, accuracies) for seconds, accuracies in curves], axis=0)
    panel.plot(grid, mean, color=COLORS[algorithm], linewidth=2, label=f"{LABELS[algorithm]}, mean of {len(curves)}")
