"""Backprop in the loop of `eggroll.train`: a trainer has `step(state, batch)`, like a strategy, and reports `Metrics`."""

import math
from typing import Any

import jax.numpy as jnp

from eggroll.population.metrics import Metrics


def gradient_metrics(step: int, *, fitness: float, gradient_norm: float = math.nan, aux: Any = None) -> Metrics:
    """Return the metrics of a gradient step; what only a population has is NaN.

    Args:
        step: that was done, from 0.
        fitness: minus the loss, or the mean reward.
        gradient_norm: before clipping.
        aux: handed to the callbacks.
    """
    unknown = jnp.float32(jnp.nan)
    return Metrics(
        generation=jnp.int32(step),
        sigma=unknown,
        mean_fitness=jnp.float32(fitness),
        best_fitness=unknown,
        std_fitness=unknown,
        invalid=jnp.int32(0),
        tied_pairs=unknown,
        pair_correlation=unknown,
        effective_rank=unknown,
        coefficients=jnp.zeros(0, jnp.float32),
        fitness=jnp.float32(fitness),
        aux=aux,
        skipped=jnp.bool_(False),
        gradient_norm=jnp.float32(gradient_norm),
        leaf_norms=jnp.zeros(0, jnp.float32),
        moved=unknown,
        kept=jnp.int32(0),
        update_over_sigma=unknown,
        update_over_weights=unknown,
        weight_norm=unknown,
        checksums=None,
    )
