"""Independent replicates of a gradient estimate, and how to judge them.

A claim "the mean of the estimator is m" is tested by z = (sample mean - m) / (sample std / sqrt(R)) per entry. With 4 sigma in
mind and up to a few hundred entries, |z| of every entry stays below `Z_LIMIT` with probability > 0.999; keys are fixed, so a
pass is a pass for good. Negative controls must exceed it.
"""

import jax
import jax.numpy as jnp
import numpy as np

from eggroll.lazy.planning import make_plan
from eggroll.population.evaluate import evaluate
from eggroll.population.layout import PopulationLayout
from eggroll.update.estimator import gradient, pair_coefficients

Z_LIMIT = 5.5


def gradients(objective, params, *, perturbation, sigma, num_pairs, replicates, seed=0):
    """[R, ...] gradient estimates of `objective(params) -> scalar`, one per generation of one run, raw fitness."""
    layout = PopulationLayout(num_pairs)
    plan = make_plan(objective, params, perturbation=perturbation)
    key = jax.random.key(seed)

    def estimate(generation):
        fitness = evaluate(
            lambda params, batch, key, state: objective(params),
            plan,
            params,
            layout=layout,
            noise_key=key,
            noise_generation=generation,
            sigma=jnp.float32(sigma),
            evaluation_key=key,
        )
        return gradient(
            plan, pair_coefficients(fitness.reshape(-1)), noise_key=key, noise_generation=generation, sigma=jnp.float32(sigma)
        )

    return jax.jit(lambda: jax.lax.map(estimate, jnp.arange(replicates, dtype=jnp.int32), batch_size=64))()


def z_scores(samples, expected):
    """Per-entry z-scores of the mean of `samples` [R, ...] against `expected` [...]."""
    samples = np.asarray(samples, np.float64)
    error = samples.std(axis=0, ddof=1) / len(samples) ** 0.5
    return (samples.mean(axis=0) - np.asarray(expected, np.float64)) / error


def through_dot(function):
    """An objective of a matrix W that is used by a product, so that it gets low-rank noise: function(I W)."""

    def objective(params):
        w = params["w"]
        return function(jnp.eye(w.shape[0], dtype=w.dtype) @ w)

    return objective
