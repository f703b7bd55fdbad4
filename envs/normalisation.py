"""Running mean and variance of observations.

    statistics (number n, mean, M2 = sum (x - mean)^2), fixed while sums are gathered
    sums       (number m, S = sum (x - c), Q = sum (x - c)^2) with c the mean of those statistics
    merge      n' = n + m,  mean' = mean + S / n',  M2' = M2 + Q - S^2 / n'

Sums of many episodes add up, so any order and any grouping gives the same statistics. Gathering them around the known mean
keeps Q - S^2 / n' from cancelling in float32 (Chan, Golub and LeVeque, 1983, The American Statistician 37(3)).
An observation whose square is not finite in float32, beyond about 1.8e19, is like one that is not finite: `is_finite` says so.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

CLIP = 10.0  # of normalised observations, in standard deviations
MIN_STD = 1e-4  # so that a constant observation is not divided by zero


class ObservationStatistics(NamedTuple):
    """Statistics of all observations so far."""

    number: Array  # float32 [], of observations
    mean: Array  # float32 [*observation_shape]
    m2: Array  # float32 [*observation_shape], sum of squared deviations from the mean


class ObservationSums(NamedTuple):
    """Sums over new observations of their deviations from the mean of the statistics in use."""

    number: Array  # float32 [], of observations
    deviation: Array  # float32 [*observation_shape]
    squared_deviation: Array  # float32 [*observation_shape]


def initial_statistics(shape: tuple[int, ...]) -> ObservationStatistics:
    """Return the statistics of no observations, under which `normalise` changes nothing but extremes."""
    return ObservationStatistics(jnp.float32(0), jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32))


def initial_sums(shape: tuple[int, ...]) -> ObservationSums:
    """Return the sums over no observations."""
    return ObservationSums(jnp.float32(0), jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32))


def is_finite(observation: Array) -> Array:
    """Whether the squares of an observation are finite, bool []: others would make the statistics NaN, which they stay."""
    return jnp.isfinite(jnp.square(observation)).all()


def add_observation(sums: ObservationSums, observation: Array, *, centre: Array) -> ObservationSums:
    """Add one observation [*observation_shape] to sums around `centre`, the mean of the statistics in use."""
    deviation = observation - centre
    return ObservationSums(sums.number + 1.0, sums.deviation + deviation, sums.squared_deviation + jnp.square(deviation))


def merge(statistics: ObservationStatistics, sums: ObservationSums) -> ObservationStatistics:
    """Merge sums into the statistics they were gathered around.

    Args:
        statistics: their mean is the centre of `sums`.
        sums: of any number of observations, none included.

    Returns:
        The statistics of all observations; those before where the sums overflowed.
    """
    number = statistics.number + sums.number
    shift = sums.deviation / jnp.maximum(number, 1.0)
    m2 = statistics.m2 + sums.squared_deviation - shift * sums.deviation
    merged = ObservationStatistics(number, statistics.mean + shift, jnp.maximum(m2, 0.0))
    finite = jnp.isfinite(merged.mean).all() & jnp.isfinite(m2).all()
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), merged, statistics)


def normalise(statistics: ObservationStatistics, observation: Array) -> Array:
    """Normalise an observation to zero mean and unit standard deviation, clipped to +-10.

    Args:
        statistics: with fewer than two observations the standard deviation counts as 1.
        observation: float32 [*observation_shape].

    Returns:
        float32 [*observation_shape].
    """
    std = jnp.sqrt(statistics.m2 / jnp.maximum(statistics.number, 1.0))
    std = jnp.where(statistics.number < 2.0, 1.0, jnp.maximum(std, MIN_STD))
    return jnp.clip((observation - statistics.mean) / std, -CLIP, CLIP)
