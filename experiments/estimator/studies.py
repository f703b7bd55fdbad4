"""The three studies: bias against rank, cosine against sigma and dimension, variance against population size."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from eggroll import Dense, LowRank
from eggroll.experiments.estimator.objectives import cubic, curved, curved_cosine, network
from eggroll.experiments.estimator.replicates import mean_and_error, power_law, replicator
from eggroll.lazy.planning import Perturbation
from eggroll.noise.addresses import Distribution


class Point(NamedTuple):
    """One measured value: abscissa, estimate, standard error and theoretical value."""

    x: float
    value: float
    error: float
    theory: float


@dataclasses.dataclass(frozen=True)
class Curve:
    """Measured points of one kind of noise or dimension; `slope` is the exponent of their power law if one is expected."""

    label: str
    points: tuple[Point, ...]
    slope: float | None = None
    slope_error: float | None = None
    dimension: int | None = None


def _power_curve(label: str, points: Sequence[Point]) -> Curve:
    x, value, error, _ = zip(*points, strict=True)
    return Curve(label, tuple(points), *power_law(x, [abs(v) for v in value], error))


def bias_by_rank(ranks: Sequence[int], *, size: int, sigma: float, num_pairs: int, replicates: int, key: Array) -> list[Curve]:
    """Measure the bias of the cubic's estimate, averaged over entries, in units of sigma^2.

    Args:
        ranks: of the noise.
        size: rows and columns of the matrix.
        sigma: standard deviation of the perturbation.
        num_pairs: P of every estimate.
        replicates: estimates per rank.
        key: consumed.

    Returns:
        Normal factors (theory: 6 / r) and Rademacher factors (theory: -2 / r), x being the rank.
    """
    objective_key, noise_key = jax.random.split(key)
    objective = cubic(size, sigma=sigma, key=objective_key)
    curves = []
    coefficients: dict[Distribution, float] = {"normal": 6.0, "rademacher": -2.0}  # r (E[e^4] - 3)
    for distribution, coefficient in coefficients.items():
        points = []
        for rank in ranks:
            noise_key, estimate_key = jax.random.split(noise_key)
            noise = LowRank(rank, distribution)
            estimates = replicator(objective, jnp.mean, perturbation=noise, num_pairs=num_pairs, replicates=replicates)
            relative_bias = estimates(estimate_key, sigma) / sigma**2
            points.append(Point(rank, *mean_and_error(relative_bias), coefficient / rank))
        curves.append(_power_curve(distribution, points))
    return curves


def cosine_by_sigma(
    sigmas: Sequence[float], sizes: Sequence[int], *, rank: int, num_pairs: int, replicates: int, key: Array
) -> list[Curve]:
    """Measure the cosine between the curved objective's gradient and the expected estimate.

    The squared norm of the expected estimate is the mean product of two different replicates, which sampling noise does not
    inflate; the error is a jackknife over replicates.

    Args:
        sigmas: standard deviations of the perturbation.
        sizes: rows and columns of the matrix, d = size^2.
        rank: of the noise, with normal factors.
        num_pairs: P of every estimate.
        replicates: estimates per point.
        key: consumed.

    Returns:
        One curve per size, x being sigma.
    """
    objective_key, noise_key = jax.random.split(key)
    curves = []
    for size in sizes:
        objective = curved(size, key=objective_key)
        noise = LowRank(rank, "normal")
        estimates = replicator(objective, jnp.ravel, perturbation=noise, num_pairs=num_pairs, replicates=replicates)
        points = []
        for sigma in sigmas:
            noise_key, estimate_key = jax.random.split(noise_key)
            cosine, error = _cosine_of_mean(estimates(estimate_key, sigma), np.ravel(objective.gradient))
            points.append(Point(sigma, cosine, error, curved_cosine(size, sigma=sigma, rank=rank)))
        curves.append(Curve(f"d = {size**2}", tuple(points), dimension=size**2))
    return curves


def _cosine_of_mean(estimates: np.ndarray, gradient: np.ndarray) -> tuple[float, float]:
    """Cosine between `gradient` [d] and the expectation of the [R, d] estimates, with its jackknife error."""
    along = estimates @ gradient / np.linalg.norm(gradient)
    products = estimates @ estimates.T
    count = len(estimates)

    def cosine(kept):
        pairs = products[np.ix_(kept, kept)]
        squared = (pairs.sum() - np.trace(pairs)) / (len(kept) * (len(kept) - 1))
        return along[kept].mean() / max(squared, 1e-30) ** 0.5

    left_out = np.array([cosine(np.delete(np.arange(count), i)) for i in range(count)])
    error = ((count - 1) * left_out.var()) ** 0.5
    return float(cosine(np.arange(count))), float(error)


def error_by_population(
    population_sizes: Sequence[int], *, width: int, sigma: float, rank: int, replicates: int, key: Array
) -> list[Curve]:
    """Measure the squared error of the network's estimate relative to the squared gradient.

    Args:
        population_sizes: N.
        width: inputs and hidden units of the network.
        sigma: standard deviation of the perturbation, small enough that the bias is negligible.
        rank: of the low-rank noise.
        replicates: estimates per point.
        key: consumed.

    Returns:
        Low-rank normal, low-rank Rademacher and dense normal noise, x being N; theory is (d + 1) / P, exact for dense normal
        noise and a linear fitness of d parameters.
    """
    objective_key, noise_key = jax.random.split(key)
    objective = network(width, key=objective_key)
    dimension = sum(leaf.size for leaf in jax.tree.leaves(objective.params))
    squared_gradient = _squared_norm(objective.gradient)

    def relative_error(estimate):
        return _squared_norm(jax.tree.map(jnp.subtract, estimate, objective.gradient)) / squared_gradient

    kinds: dict[str, Perturbation] = {
        f"rank {rank} normal": LowRank(rank, "normal"),
        f"rank {rank} Rademacher": LowRank(rank, "rademacher"),
        "dense normal": Dense("normal"),
    }
    curves = []
    for label, perturbation in kinds.items():
        points = []
        for population_size in population_sizes:
            noise_key, estimate_key = jax.random.split(noise_key)
            num_pairs = population_size // 2
            estimates = replicator(
                objective, relative_error, perturbation=perturbation, num_pairs=num_pairs, replicates=replicates
            )
            points.append(
                Point(population_size, *mean_and_error(estimates(estimate_key, sigma)), 2 * (dimension + 1) / population_size)
            )
        curves.append(_power_curve(label, points))
    return curves


def _squared_norm(tree) -> Array:
    return sum((jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)), jnp.float32(0))
