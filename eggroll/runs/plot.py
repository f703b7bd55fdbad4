"""The figure of a training run: fitness above, and below it small panels that say whether and how far the run moves.

The axis of the fitness has the population, held-out scores and references that the caller names, and nothing else.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HELD_OUT = {"held_out_return": "held-out return", "held_out_fitness": "held-out fitness"}
PANELS = {
    "gradient_norm": "gradient norm",
    "update_over_sigma": "update / sigma",
    "tied_pairs": "tied pairs",
    "weight_norm": "weight norm",
    "loss": "loss",
}
_FORMATTED_FROM = 10_000  # ticks of the x axis are 20k instead of 20000


def plot_history(
    history: Sequence[Any], path: str | Path, *, x: str = "generation", references: Mapping[str, float] | None = None
) -> None:
    """Draw mean, spread and best of the fitness with its held-out score, and below them `PANELS`, as a PNG.

    Args:
        history: records of `training.train`, or rows of `metrics.jsonl`; nothing is drawn when empty.
        path: the file, replaced if it exists.
        x: "generation", or what is counted on the x axis, such as "env_steps"; a second axis then has the generations.
        references: label -> fitness, dotted lines.

    Warns:
        UserWarning: matplotlib is not installed, nothing is drawn.
    """
    rows = [row for row in map(_as_row, history) if row.get(x) is not None]
    if not rows:
        return
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        warnings.warn(f"matplotlib is not installed, so {path} was not drawn.", stacklevel=2)
        return
    names = [name for name in PANELS if any(row.get(name) is not None for row in rows)]
    lower = [names[first : first + 2] for first in range(0, len(names), 2)]
    layout: Any = [["fitness", "fitness"], *([*pair, "."] if len(pair) == 1 else pair for pair in lower)]
    figure = Figure(figsize=(8, 4 + 1.6 * len(lower)), layout="constrained")
    FigureCanvasAgg(figure)  # the Agg canvas by name: no display, and pyplot's state is left alone
    axes: Any = figure.subplot_mosaic(layout, height_ratios=(2.4, *[1] * len(lower)))
    _draw_fitness(axes["fitness"], rows, x, references or {})
    for name in names:
        _plot_line(axes[name], _column(rows, x), _column(rows, name), color="tab:green", linewidth=1)
        axes[name].set_ylabel(PANELS[name], fontsize=9)
    for panel in axes.values():
        panel.grid(alpha=0.3)
        _label_thousands(panel, rows[-1][x])
    for name in layout[-1]:
        if name != ".":
            axes[name].set_xlabel(x.replace("env_", "environment ").replace("_", " "))
    figure.savefig(path, dpi=120)


def _as_row(record: Any) -> Mapping[str, Any]:
    return record if isinstance(record, Mapping) else vars(record) | record.extra


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """Values, NaN where a row has none."""
    values = (row.get(name) for row in rows)
    return np.array([math.nan if value is None else value for value in values], np.float64)


def _plot_line(axes: Any, at: np.ndarray, values: np.ndarray, **style: Any) -> None:
    """Plot a line, and a point where a value has no neighbours to be joined with."""
    known = np.pad(np.isfinite(values), 1)
    alone = known[1:-1] & ~known[:-2] & ~known[2:]
    axes.plot(at, values, marker=".", markevery=np.flatnonzero(alone).tolist(), **style)


def _draw_fitness(axes: Any, rows: Sequence[Mapping[str, Any]], x: str, references: Mapping[str, float]) -> None:
    at, mean, spread = (_column(rows, name) for name in (x, "mean_fitness", "std_fitness"))
    best = _column(rows, "best_fitness")
    if not np.isnan(best).all():
        _plot_line(axes, at, best, color="tab:orange", linewidth=1, label="best member")
    _plot_line(axes, at, mean, color="tab:blue", label="mean")
    if not np.isnan(spread).all():
        axes.fill_between(at, mean - spread, mean + spread, color="tab:blue", alpha=0.2, label="mean ± standard deviation")
    for name, label in HELD_OUT.items():
        if checks := [row for row in rows if row.get(name) is not None]:
            axes.plot(_column(checks, x), _column(checks, name), "o-", color="tab:red", markersize=4, label=label)
    for label, value in references.items():
        axes.axhline(value, color="#555555", linestyle=":", label=label)
    axes.set(ylabel="fitness")
    axes.legend(fontsize=9)
    if x != "generation":
        _add_generations(axes, at, _column(rows, "generation"))


def _add_generations(axes: Any, at: np.ndarray, generations: np.ndarray) -> None:
    """Add an axis above with round numbers of generations, at the places where they ended."""
    from matplotlib.ticker import MaxNLocator

    if not np.isfinite(generations).all():
        return
    ticks = MaxNLocator(nbins=8, integer=True).tick_values(generations[0], generations[-1])
    ticks = ticks[(ticks >= generations[0]) & (ticks <= generations[-1])]
    upper = axes.twiny()
    upper.set_xlim(axes.get_xlim())
    upper.set_xticks(np.interp(ticks, generations, at), [f"{tick:,.0f}" for tick in ticks])
    upper.set_xlabel("generation")


def _label_thousands(axes: Any, last: float) -> None:
    """Write 20000 on the x axis as 20k, so that labels of small panels do not touch."""
    from matplotlib.ticker import EngFormatter

    if last >= _FORMATTED_FROM:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
