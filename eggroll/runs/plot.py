"""The figure of a training run: fitness and gradient norm against the generation."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def plot_history(history: Sequence[Any], path: str | Path) -> None:
    """Draw best and mean fitness, and below them the gradient norm, as a PNG.

    Args:
        history: records of `training.train`; nothing is drawn when empty.
        path: the file, replaced if it exists.

    Warns:
        UserWarning: matplotlib is not installed, nothing is drawn.
    """
    if not history:
        return
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        warnings.warn(f"matplotlib is not installed, so {path} was not drawn.", stacklevel=2)
        return
    figure = Figure(figsize=(7, 6), layout="constrained")
    FigureCanvasAgg(figure)  # the Agg canvas by name: no display, and pyplot's state is left alone
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    generations = [record.generation for record in history]
    _draw_fitness(top, generations, history)
    bottom.plot(generations, [record.gradient_norm for record in history], color="tab:green")
    bottom.set(xlabel="generation", ylabel="gradient norm")
    figure.savefig(path, dpi=120)


def _draw_fitness(axes: Any, generations: list[int], history: Sequence[Any]) -> None:
    mean = [record.mean_fitness for record in history]
    spread = [record.std_fitness for record in history]
    low, high = ([m + sign * s for m, s in zip(mean, spread, strict=True)] for sign in (-1, 1))
    axes.plot(generations, [record.best_fitness for record in history], color="tab:orange", label="best member")
    axes.plot(generations, mean, color="tab:blue", label="mean")
    axes.fill_between(generations, low, high, color="tab:blue", alpha=0.2, label="mean ± standard deviation")
    for index, name in enumerate(sorted({name for record in history for name in record.extra})):
        points = [(record.generation, record.extra[name]) for record in history if name in record.extra]
        label, color = name.replace("_", " "), f"C{3 + index}"
        axes.plot(*zip(*points, strict=True), label=label, marker="o", markersize=3, color=color)
    axes.set(ylabel="fitness")
    axes.legend()
