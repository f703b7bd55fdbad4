"""The figure of a pretraining run: bits per byte against the generation, with the references as horizontal lines."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

from experiments.data.references import Reference


def plot_bits(folder: Path, references: Sequence[Reference]) -> None:
    """Draw `bits_per_byte.png` from the lines of `metrics.jsonl`, both in `folder`; nothing is drawn when there are none.

    Warns:
        UserWarning: matplotlib is not installed, nothing is drawn.
    """
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if not rows:
        return
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        warnings.warn(f"matplotlib is not installed, so {folder / 'bits_per_byte.png'} was not drawn.", stacklevel=2)
        return
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([row["generation"] + 1 for row in rows], [row["mean_bits"] for row in rows], color="tab:blue", alpha=0.4, lw=0.7)
    checked = [row for row in rows if "validation_bits" in row]
    points = [row["generation"] + 1 for row in checked], [row["validation_bits"] for row in checked]
    axes.plot(*points, marker="o", markersize=3, color="tab:orange")
    names = ["mean of the population, training text", "unperturbed parameters, validation text"]
    for index, reference in enumerate(references):
        axes.axhline(reference.bits_per_byte, color=f"C{2 + index}", lw=1, ls="--")
        names.append(f"{reference.name} {reference.bits_per_byte:.2f}")
    axes.legend(axes.lines, names, fontsize="small")
    axes.set(xlabel="generation", ylabel="bits per byte", ylim=(0, None))
    figure.savefig(folder / "bits_per_byte.png", dpi=120)
