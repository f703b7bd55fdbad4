"""The figure: one panel per study, measured points with two standard errors, theory as lines."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from eggroll.experiments.estimator.studies import Curve

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # distinguishable by colour-blind readers
MARKERS = ("o", "s", "^", "D")


def draw_figure(bias: Sequence[Curve], cosine: Sequence[Curve], error: Sequence[Curve], path: Path) -> None:
    """Draw the three studies.

    Args:
        bias: from `bias_by_rank`.
        cosine: from `cosine_by_sigma`.
        error: from `error_by_population`.
        path: PNG file to write.
    """
    figure = Figure(figsize=(16.5, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3)
    _draw_bias(axes[0], bias)
    _draw_cosine(axes[1], cosine)
    _draw_error(axes[2], error)
    for panel in axes:
        panel.grid(True, which="major", alpha=0.3)
        panel.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)


def _draw_curve(panel: Axes, curve: Curve, index: int, *, label: str, shift: float = 1.0) -> None:
    """Draw one curve; `shift` scales the abscissa of its points so that coinciding curves stay visible."""
    x, value, error, theory = np.array(curve.points).T
    color = COLORS[index % len(COLORS)]
    panel.plot(x, np.abs(theory), color=color, linewidth=1)
    marker = MARKERS[index % len(MARKERS)]
    panel.errorbar(x * shift, value, 2 * error, fmt=marker, color=color, markersize=5, capsize=3, label=label)


def _draw_bias(panel: Axes, curves: Sequence[Curve]) -> None:
    names = {"normal": "normal factors, theory +6 / r", "rademacher": "Rademacher factors, theory -2 / r"}
    for index, curve in enumerate(curves):
        sizes = tuple(point._replace(value=abs(point.value)) for point in curve.points)
        shown = dataclasses.replace(curve, points=sizes)
        _draw_curve(panel, shown, index, label=f"{names[curve.label]}; slope {curve.slope:.2f}")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=2)
    panel.xaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_major_formatter("{x:g}")
    panel.set(xlabel="rank r", ylabel=r"|bias| / $\sigma^2$, mean over entries")
    panel.set_title(r"(a) Bias for $\sum w^3$ against normal smoothing")


def _draw_cosine(panel: Axes, curves: Sequence[Curve]) -> None:
    for index, curve in enumerate(curves):
        _draw_curve(panel, curve, index, label=curve.label)
        assert curve.dimension is not None
        panel.axvline(curve.dimension**-0.5, color=COLORS[index % len(COLORS)], linestyle=":", linewidth=1)
    panel.set(xscale="log", ylim=(-0.05, 1.05), xlabel=r"$\sigma$  (dotted: $d^{-1/2}$)", ylabel="cosine with jax.grad")
    panel.set_title(r"(b) Expected estimate of $\langle A, w\rangle + \langle B, w\rangle |w|^2$")


def _draw_error(panel: Axes, curves: Sequence[Curve]) -> None:
    for index, curve in enumerate(curves):
        _draw_curve(panel, curve, index, label=f"{curve.label}; slope {curve.slope:.2f}", shift=1.12 ** (index - 1))
    panel.set_xscale("log", base=2)
    panel.set(yscale="log", xlabel="population size N", ylabel=r"$|g - \nabla|^2\; /\; |\nabla|^2$")
    panel.set_title("(c) Sampling error, two-layer network, line 2 (d + 1) / N", fontsize=11)
