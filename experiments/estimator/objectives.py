"""Toy fitness functions whose smoothed gradient is known in closed form.

    cubic      sum(w^3) - <3 w0^2 + 3 sigma^2, w>            normal smoothing gives gradient 0 at w0, so an estimate is all bias
    curved     <A, w> + <B, w> |w|^2,  A and B orthonormal    gradient A at 0, smoothed gradient A + sigma^2 c B
    network    fit of a small multilayer perceptron           gradient by jax.grad

Matrices are multiplied by the identity, since only a contracted parameter gets low-rank noise.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Objective(NamedTuple):
    """The fitness of one member, the parameters where it is probed, and the gradient that estimates are compared with."""

    fitness: Callable[[Any], Array]
    params: Any
    gradient: Any


def _contracted(matrix: Array) -> Array:
    return jnp.eye(matrix.shape[0], dtype=matrix.dtype) @ matrix


def cubic(size: int, *, sigma: float, key: Array) -> Objective:
    """Make sum(w^3) minus the linear function that has its normal-smoothed gradient.

    An estimate is exactly unbiased for the linear part at every rank, so subtracting it only removes variance: the mean of
    the estimate is the bias sigma^2 (E[e^4] - 3), where e is one entry of the noise.

    Args:
        size: rows and columns of the matrix.
        sigma: standard deviation of the smoothing.
        key: draws w0.

    Returns:
        `Objective` with gradient 0.
    """
    w0 = jax.random.normal(key, (size, size))
    smoothed = 3.0 * w0**2 + 3.0 * sigma**2

    def fitness(w):
        values = _contracted(w)
        return jnp.sum(values**3 - smoothed * values)

    return Objective(fitness, w0, jnp.zeros_like(w0))


def curved(size: int, *, key: Array) -> Objective:
    """Make <A, w> + <B, w> |w|^2, probed at w = 0, whose gradient there is A.

    Args:
        size: rows and columns of the matrix; d = size^2.
        key: draws A and B.

    Returns:
        `Objective`.
    """
    a_key, b_key = jax.random.split(key)
    a = jax.random.normal(a_key, (size, size))
    a = a / jnp.linalg.norm(a)
    b = jax.random.normal(b_key, (size, size))
    b = b - jnp.sum(a * b) * a
    b = b / jnp.linalg.norm(b)

    def fitness(w):
        values = _contracted(w)
        return jnp.sum(a * values) + jnp.sum(b * values) * jnp.sum(values**2)

    params = jnp.zeros((size, size))
    return Objective(fitness, params, jax.grad(fitness)(params))


def curved_cosine(size: int, *, sigma: float, rank: int) -> float:
    """Cosine between gradient and expected estimate of `curved` under rank-r noise with normal factors.

    The smoothed gradient is A + sigma^2 c B with c = sum_j E[e_i^2 e_j^2] = d + 2 + (4 size + 2) / r, so the estimate turns
    away from the gradient where sigma exceeds d^(-1/2).
    """
    c = size**2 + 2 + (4 * size + 2) / rank
    return (1.0 + (sigma**2 * c) ** 2) ** -0.5


def network(width: int, *, key: Array) -> Objective:
    """Make the fit of a two-layer tanh network to random data: negative mean squared error over 64 points.

    Args:
        width: inputs and hidden units.
        key: draws data and parameters.

    Returns:
        `Objective` with the gradient from `jax.grad`.
    """
    x_key, y_key, hidden_key, out_key = jax.random.split(key, 4)
    x, y = jax.random.normal(x_key, (64, width)), jax.random.normal(y_key, (64, width))
    params = {
        "hidden": jax.random.normal(hidden_key, (width, width)) / width**0.5,
        "bias": jnp.zeros(width),
        "out": jax.random.normal(out_key, (width, width)) / width**0.5,
    }

    def fitness(params):
        return -jnp.mean((jnp.tanh(x @ params["hidden"] + params["bias"]) @ params["out"] - y) ** 2)

    return Objective(fitness, params, jax.grad(fitness)(params))
