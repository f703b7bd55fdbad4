"""The figure of a suite: for every task held-out return against environment steps, and below against seconds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from eggroll.experiments.common.bootstrap import mean_interval

COLORS = {"eggroll": "#0072b2", "openes": "#d55e00", "ppo": "#009e73", "random": "#555555"}  # told apart by the colour-blind
COLUMNS = 4
AXES: dict[Literal["env_steps", "seconds"], str] = {
    "env_steps": "environment steps",
    "seconds": "seconds of training, without compilation",
}


class Curve(NamedTuple):
    """The held-out checks of a seed, in order."""

    env_steps: Sequence[float]
    seconds: Sequence[float]  # of training until the check, without compilation
    returns: Sequence[float]


def draw_curves(curves: Mapping[str, Mapping[str, Sequence[Curve]]], random_returns: Mapping[str, float], path: Path) -> None:
    """Draw the learning curves.

    Args:
        curves: task -> algorithm -> curves of its seeds.
        random_returns: task -> mean return of random actions, a dotted line.
        path: PNG file to write.
    """
    columns = min(COLUMNS, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(4 * columns, 6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2 * rows, columns, squeeze=False)
    for panel in panels.flat:
        panel.set_axis_off()
    for index, (env, of_algorithms) in enumerate(curves.items()):
        row, column = divmod(index, columns)
        for panel, (axis, label) in zip(panels[2 * row : 2 * row + 2, column], AXES.items(), strict=True):
            panel.set_axis_on()
            for algorithm, of_seeds in of_algorithms.items():
                _draw(panel, algorithm, of_seeds, axis)
            panel.axhline(random_returns[env], color="#555555", linestyle=":", linewidth=1, label="random")
            panel.set_xlabel(label, fontsize=8)
            panel.grid(alpha=0.3)
        panels[2 * row, column].set_title(env, fontsize=9)
    panels[0, 0].legend(frameon=False, fontsize=8)
    figure.supylabel("held-out mean return, 95 % interval over seeds")
    figure.savefig(path, dpi=110)


def _draw(panel: Axes, algorithm: str, curves: Sequence[Curve], axis: Literal["env_steps", "seconds"]) -> None:
    curves = [curve for curve in curves if curve.returns]
    if not curves:
        return
    along = [getattr(curve, axis) for curve in curves]
    start, end = max(at[0] for at in along), min(at[-1] for at in along)
    grid = np.linspace(start, end if start < end else max(at[-1] for at in along), 25)  # a run that has ended keeps its return
    returns = np.array([np.interp(grid, at, curve.returns) for at, curve in zip(along, curves, strict=True)])  # [seeds, grid]
    low, high = np.array([mean_interval(at) for at in returns.T]).T
    panel.plot(grid, returns.mean(axis=0), color=COLORS[algorithm], label=algorithm)
    panel.fill_between(grid, low, high, color=COLORS[algorithm], alpha=0.2)
