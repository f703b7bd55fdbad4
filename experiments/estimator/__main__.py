"""Run the three studies: figure, table, `metrics.json`, and the slopes as the last line, JSON."""

import dataclasses
import json
import time
from collections.abc import Sequence
from typing import Any

import jax
import tyro

from eggroll.experiments.common.run import jsonable, print_summary, run_folder, use_compilation_cache
from eggroll.experiments.estimator.figure import draw_figure
from eggroll.experiments.estimator.studies import Curve, bias_by_rank, cosine_by_sigma, error_by_population


@dataclasses.dataclass(frozen=True)
class Config:
    """Bias, cosine and variance of the gradient estimate on toy objectives."""

    ranks: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Ranks of the bias study."""
    bias_size: int = 16
    """Rows and columns of the bias study's matrix."""
    bias_pairs: int = 4096
    """Antithetic pairs of one estimate in the bias study."""
    bias_replicates: int = 64
    """Independent estimates per rank."""
    sigmas: tuple[float, ...] = (0.003, 0.006, 0.009, 0.014, 0.02, 0.03, 0.045, 0.07, 0.1, 0.15, 0.25, 0.5)
    """Standard deviations of the cosine study."""
    sizes: tuple[int, ...] = (8, 16, 32, 64)
    """Rows and columns of the cosine study's matrices; d is the square."""
    cosine_pairs: int = 1024
    """Antithetic pairs of one estimate in the cosine study."""
    cosine_replicates: int = 16
    """Independent estimates per point."""
    population_sizes: tuple[int, ...] = (64, 256, 1024, 4096)
    """Population sizes of the variance study."""
    width: int = 16
    """Inputs and hidden units of the variance study's network."""
    error_replicates: int = 32
    """Independent estimates per point."""
    rank: int = 1
    """Rank of the noise in the cosine and variance studies."""
    seed: int = 0
    """Random seed."""
    run: str = "estimator"
    """Folder of the artefacts, under runs/."""


def main(config: Config) -> dict[str, Any]:
    """Run the studies and write `figure.png`, `table.txt` and `metrics.json`.

    Args:
        config: sizes; the defaults take one to two minutes on two cores.

    Returns:
        The summary, as printed on the last line.
    """
    use_compilation_cache()
    start = time.perf_counter()
    folder = run_folder(config.run)
    bias_key, cosine_key, error_key = jax.random.split(jax.random.key(config.seed), 3)
    bias = bias_by_rank(
        config.ranks,
        size=config.bias_size,
        sigma=1.0,
        num_pairs=config.bias_pairs,
        replicates=config.bias_replicates,
        key=bias_key,
    )
    cosine = cosine_by_sigma(
        config.sigmas,
        config.sizes,
        rank=config.rank,
        num_pairs=config.cosine_pairs,
        replicates=config.cosine_replicates,
        key=cosine_key,
    )
    error = error_by_population(
        config.population_sizes,
        width=config.width,
        sigma=0.01,
        rank=config.rank,
        replicates=config.error_replicates,
        key=error_key,
    )
    draw_figure(bias, cosine, error, folder / "figure.png")
    studies = {"bias / sigma^2, by rank": bias, "cosine with the gradient, by sigma": cosine, "squared error, by N": error}
    table = "\n\n".join(_table(title, curves) for title, curves in studies.items())
    (folder / "table.txt").write_text(table + "\n")
    print(table)
    summary = {
        "bias_slope": bias[0].slope,
        "bias_slope_error": bias[0].slope_error,
        "bias_slope_rademacher": bias[1].slope,
        "variance_slope": error[1].slope,
        "variance_slopes": {curve.label: curve.slope for curve in error},
        "max_z": max(abs(p.value - p.theory) / p.error for curve in [*bias, *cosine] for p in curve.points),
        "seconds": time.perf_counter() - start,
        "figure": str(folder / "figure.png"),
    }
    curves = {title: [dataclasses.asdict(curve) for curve in study] for title, study in studies.items()}
    metrics = {"config": dataclasses.asdict(config), "summary": summary, "curves": curves}
    (folder / "metrics.json").write_text(json.dumps(jsonable(metrics), indent=1))
    print_summary(summary)
    return summary


def _table(title: str, curves: Sequence[Curve]) -> str:
    lines = [title, f"  {'curve':20}{'x':>10}{'measured':>12}{'+-':>10}{'theory':>12}"]
    for curve in curves:
        for x, value, error, theory in curve.points:
            lines.append(f"  {curve.label:20}{x:>10g}{value:>12.4f}{error:>10.4f}{theory:>12.4f}")
        if curve.slope is not None:
            lines.append(f"  {curve.label:20}{'slope':>10}{curve.slope:>12.3f}{curve.slope_error:>10.3f}{-1:>12.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m eggroll.experiments.estimator"))
