"""Figures of pretraining: bits per byte against the generation, or the population; references are horizontal lines."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eggroll.experiments.egg.data.references import Reference
from eggroll.runs.metrics import read_metrics


def plot_bits(folder: Path, references: Sequence[Reference]) -> None:
    """Draw `bits_per_byte.png` from the lines of `metrics.jsonl`, both in `folder`; nothing is drawn when there are none.

    Warns:
        UserWarning: matplotlib is not installed, nothing is drawn.
    """
    rows = read_metrics(folder)

    def draw(axes: Any) -> None:
        steps, bits = [row["generation"] + 1 for row in rows], [row["mean_bits"] for row in rows]
        axes.plot(steps, bits, color="tab:blue", alpha=0.4, lw=0.7, label="mean of the population, training text")
        checked = [row for row in rows if "validation_bits" in row]
        points = [row["generation"] + 1 for row in checked], [row["validation_bits"] for row in checked]
        axes.plot(*points, marker="o", markersize=3, color="tab:orange", label="unperturbed parameters, validation text")
        axes.set(xlabel="generation", ylabel="bits per byte", ylim=(0, None))

    if rows:
        lines = {reference.name: reference.bits_per_byte for reference in references}
        _figure(folder / "bits_per_byte.png", draw, lines)


def plot_curves(curves: Mapping[str, Sequence[tuple[int, float]]], path: Path, *, lines: Mapping[str, float]) -> None:
    """Draw validation bits per byte against updates into `path`, a curve per name; warns as `plot_bits`."""

    def draw(axes: Any) -> None:
        for name, points in curves.items():
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        axes.set(xlabel="updates", ylabel="validation bits per byte")

    _figure(path, draw, lines)


def plot_scaling(bits: Mapping[int, Sequence[float]], path: Path, *, lines: Mapping[str, float]) -> None:
    """Draw validation bits per byte against the population into `path`; warns as `plot_bits`.

    Args:
        bits: population -> bits of its seeds; mean, standard deviation and single seeds are shown.
        path: PNG file.
        lines: name -> bits, a horizontal line each.
    """
    populations = sorted(bits)
    values = [np.asarray(bits[population]) for population in populations]
    means, spreads = (np.array([summary(of_seeds) for of_seeds in values]) for summary in (np.mean, np.std))

    def draw(axes: Any) -> None:
        axes.plot(populations, means, marker="o", color="black", label="EGG, mean of the seeds")
        axes.fill_between(populations, means - spreads, means + spreads, color="black", alpha=0.15, label="standard deviation")
        for population, of_seeds in zip(populations, values, strict=True):
            axes.plot([population] * len(of_seeds), of_seeds, ".", color="grey", markersize=4)
        axes.set_xscale("log", base=2)
        axes.set(xlabel="population", ylabel="validation bits per byte")

    _figure(path, draw, lines)


def _figure(path: Path, draw: Callable[[Any], None], lines: Mapping[str, float]) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        warnings.warn(f"matplotlib is not installed, so {path} was not drawn.", stacklevel=3)
        return
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    draw(axes)
    for index, (name, bits) in enumerate(lines.items()):
        axes.axhline(bits, color=f"C{2 + index}", lw=1, ls="--", label=f"{name} {bits:.2f}")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
