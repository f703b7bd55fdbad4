"""Rows of the comparison: means over seeds with bootstrap intervals, what they say, and the table.

Intervals are percentiles of the means of seeds drawn with replacement. With few seeds they are too narrow rather than too wide.
"""

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

RESAMPLES = 10_000


class Row(NamedTuple):
    """One task and algorithm."""

    env: str
    algorithm: str
    seeds: int
    mean_return: float
    low: float  # 95 % bootstrap interval over seeds
    high: float
    random_return: float  # mean over seeds of uniformly random actions
    env_steps: int  # mean over seeds
    seconds: float  # mean over seeds, of training
    generation_seconds: float  # median over seeds of the medians over generations; PPO: updates
    peak_mib: int  # of the process that ran the seeds
    returns: tuple[float, ...]  # of the seeds


def _resampled_means(values: Sequence[float]) -> np.ndarray:
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    return np.asarray(values, np.float64)[drawn].mean(axis=1)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean."""
    low, high = np.quantile(_resampled_means(values), [0.025, 0.975])
    return float(low), float(high)


def difference_interval(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of mean(first) - mean(second); the samples are drawn independently."""
    second_means = np.random.default_rng(1).permutation(_resampled_means(second))
    low, high = np.quantile(_resampled_means(first) - second_means, [0.025, 0.975])
    return float(low), float(high)


def make_row(env: str, algorithm: str, summaries: Sequence[dict[str, Any]]) -> Row:
    """Make a row of the summaries of its seeds."""
    returns = tuple(float("nan") if s["mean_return"] is None else s["mean_return"] for s in summaries)
    low, high = interval(returns)
    return Row(
        env,
        algorithm,
        len(summaries),
        statistics.fmean(returns),
        low,
        high,
        statistics.fmean(s["random_return"] for s in summaries),
        round(statistics.fmean(s["env_steps"] for s in summaries)),
        statistics.fmean(s["seconds"] for s in summaries),
        statistics.median(s["generation_seconds"] for s in summaries),
        max(s["peak_mib"] for s in summaries),
        returns,
    )


def compare(rows: Sequence[Row]) -> dict[str, Any]:
    """Say what the rows show.

    Returns:
        above_random: tasks -> whether the interval of every algorithm lies above the random return.
        not_worse: tasks -> whether the interval of eggroll's mean minus openes' reaches 0.
        generation_ratio: tasks -> seconds of a generation, openes over eggroll.
    """
    by_name = {(row.env, row.algorithm): row for row in rows}
    envs = list(dict.fromkeys(row.env for row in rows))
    above = {(row.env, row.algorithm): row.low > row.random_return for row in rows if row.algorithm != "random"}
    pairs = {env: (by_name.get((env, "eggroll")), by_name.get((env, "openes"))) for env in envs}
    both = {env: (ours, dense) for env, (ours, dense) in pairs.items() if ours is not None and dense is not None}
    return {
        "above_random": {env: {name: value for (of, name), value in above.items() if of == env} for env in envs},
        "not_worse": {env: difference_interval(ours.returns, dense.returns)[1] >= 0 for env, (ours, dense) in both.items()},
        "generation_ratio": {
            env: round(dense.generation_seconds / ours.generation_seconds, 2) for env, (ours, dense) in both.items()
        },
    }


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    head = (
        "| task | algorithm | mean return [95 % interval] | random | seeds | env steps | seconds | s / generation | peak MiB |"
    )
    lines = [head, "|---" * 9 + "|"]
    for row in rows:
        returns = f"{row.mean_return:.4g} [{row.low:.4g}, {row.high:.4g}]"
        cells = [row.env, row.algorithm, returns, f"{row.random_return:.4g}", str(row.seeds), f"{row.env_steps:,}"]
        cells += [f"{row.seconds:.1f}", f"{row.generation_seconds:.3g}", f"{row.peak_mib:,}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
