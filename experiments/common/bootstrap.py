"""Bootstrap intervals of means over seeds: percentiles of the means of seeds drawn with replacement.

With few seeds they are too narrow rather than too wide.
"""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000
_QUANTILES = (0.025, 0.975)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean."""
    low, high = np.quantile(_resampled_means(values), _QUANTILES)
    return float(low), float(high)


def difference_interval(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of mean(first) - mean(second); the samples are drawn independently."""
    second_means = np.random.default_rng(1).permutation(_resampled_means(second))
    low, high = np.quantile(_resampled_means(first) - second_means, _QUANTILES)
    return float(low), float(high)


def _resampled_means(values: Sequence[float]) -> np.ndarray:
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    return np.asarray(values, np.float64)[drawn].mean(axis=1)
