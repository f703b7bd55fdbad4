"""Independent gradient estimates of one objective, one per generation of the engine, and their statistics."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from eggroll.experiments.estimator.objectives import Objective
from eggroll.lazy.planning import Perturbation, make_plan
from eggroll.population.evaluate import evaluate
from eggroll.population.layout import PopulationLayout
from eggroll.update.estimator import gradient, pair_coefficients


def replicator(
    objective: Objective, summary: Callable[[Any], Any], *, perturbation: Perturbation, num_pairs: int, replicates: int
) -> Callable[[Array, float], Any]:
    """Make a function that estimates the gradient of an objective once per generation, from its raw fitness.

    Args:
        objective: what to estimate.
        summary: reduces one estimate, a pytree like the parameters, to the statistics to keep.
        perturbation: the noise.
        num_pairs: P of every estimate.
        replicates: R, number of independent estimates.

    Returns:
        `estimates(key, sigma)`, compiled once; it consumes the key and returns results of `summary` with a leading axis of R.
    """
    plan = make_plan(objective.fitness, objective.params, perturbation=perturbation)

    @jax.jit
    def estimates(key, sigma):
        noise_key, evaluation_key = jax.random.split(key)

        def estimate(generation):
            fitness = evaluate(
                lambda params, batch, key, member_state: objective.fitness(params),
                plan,
                objective.params,
                layout=PopulationLayout(num_pairs),
                noise_key=noise_key,
                noise_generation=generation,
                sigma=sigma,
                evaluation_key=evaluation_key,
            )
            coefficients = pair_coefficients(fitness.reshape(-1))
            return summary(gradient(plan, coefficients, noise_key=noise_key, noise_generation=generation, sigma=sigma))

        return jax.lax.map(estimate, jnp.arange(replicates, dtype=jnp.int32))

    return lambda key, sigma: jax.device_get(estimates(key, jnp.float32(sigma)))


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean over [R] replicates and its standard error."""
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)


def power_law(x: Sequence[float], y: Sequence[float], error: Sequence[float]) -> tuple[float, float]:
    """Fit y = c x^slope by least squares in logarithms, weighted by the standard errors of y.

    Args:
        x, y: [K] positive points.
        error: [K] standard errors of y.

    Returns:
        `(slope, standard error of the slope)`.
    """
    log_x, log_y = np.log(x), np.log(y)
    weights = (np.asarray(y) / np.asarray(error)) ** 2
    centred = log_x - np.average(log_x, weights=weights)
    spread = np.sum(weights * centred**2)
    return float(np.sum(weights * centred * log_y) / spread), float(spread**-0.5)
