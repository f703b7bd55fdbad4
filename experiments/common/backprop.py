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
    known = {
        "generation": jnp.int32(step),
        "mean_fitness": jnp.float32(fitness),
        "fitness": jnp.float32(fitness),
        "gradient_norm": jnp.float32(gradient_norm),
        "invalid": jnp.int32(0),
        "kept": jnp.int32(0),
        "skipped": jnp.bool_(False),
        "coefficients": jnp.zeros(0, jnp.float32),
        "leaf_norms": jnp.zeros(0, jnp.float32),
        "aux": aux,
        "checksums": None,
    }
    return Metrics(**dict.fromkeys(Metrics._fields, jnp.float32(jnp.nan)) | known)
