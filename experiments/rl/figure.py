"""The figure: one panel per task, held-out return against environment steps, mean over seeds with its interval."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from eggroll.experiments.common.bootstrap import mean_interval

COLORS = {"eggroll": "#0072b2", "openes": "#d55e00", "ppo": "#009e73", "random": "#555555"}  # told apart by the colour-blind
COLUMNS = 4
Curve = tuple[Sequence[float], Sequence[float]]  # environment steps and returns of a seed


def draw_curves(curves: Mapping[str, Mapping[str, Sequence[Curve]]], random_returns: Mapping[str, float], path: Path) -> None:
    """Draw the learning curves.

    Args:
        curves: task -> algorithm -> curves of its seeds.
        random_returns: task -> mean return of random actions, a dotted line.
        path: PNG file to write.
    """
    columns = min(COLUMNS, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(4 * columns, 3 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, (env, of_algorithms) in zip(panels, curves.items(), strict=False):
        for algorithm, of_seeds in of_algorithms.items():
            _draw(panel, algorithm, of_seeds)
        panel.axhline(random_returns[env], color="#555555", linestyle=":", linewidth=1, label="random")
        panel.set_title(env, fontsize=9)
        panel.grid(alpha=0.3)
    for panel in panels[len(curves) :]:
        panel.set_axis_off()
    panels[0].legend(frameon=False, fontsize=8)
    figure.supxlabel("environment steps")
    figure.supylabel("held-out mean return, 95 % interval over seeds")
    figure.savefig(path, dpi=110)


def _draw(panel: Axes, algorithm: str, curves: Sequence[Curve]) -> None:
    curves = [curve for curve in curves if len(curve[0])]
    if not curves:
        return
    start, end = max(steps[0] for steps, _ in curves), min(steps[-1] for steps, _ in curves)
    grid = np.linspace(start, max(start, end), 25)
    returns = np.array([np.interp(grid, steps, values) for steps, values in curves])  # [seeds, grid]
    low, high = np.array([mean_interval(at) for at in returns.T]).T
    panel.plot(grid, returns.mean(axis=0), color=COLORS[algorithm], label=algorithm)
    panel.fill_between(grid, low, high, color=COLORS[algorithm], alpha=0.2)
