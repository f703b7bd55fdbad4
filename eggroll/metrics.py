"""What a generation reports: statistics of the fitness, and aux values reduced over the population."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

REDUCTIONS = ("sum", "mean", "max", "min", "all")


class Metrics(NamedTuple):
    """What one generation reports; statistics are over the members whose fitness is finite."""

    generation: Array  # int32 [], the generation just done
    mean_fitness: Array  # float32 []
    best_fitness: Array  # float32 []
    std_fitness: Array  # float32 []
    invalid: Array  # int32 [], members whose fitness was not finite
    skipped: Array  # bool [], nothing changed: every member was invalid, or the gradient not finite
    gradient_norm: Array  # float32 []
    sigma: Array  # float32 []
    fitness: Array  # float32 [N] or [N, K], raw
    aux: Any  # reduced over the valid members, or None


def summarise(generation: Array, fitness: Array, *, sigma: Array, gradient: Any, aux: Any) -> Metrics:
    """Report a generation from its raw fitness [N] or [N, K] and the ascent gradient."""
    valid = valid_members(fitness)
    columns = fitness.reshape(fitness.shape[0], -1)
    finite = jnp.isfinite(columns)
    scores = jnp.where(finite, columns, 0.0).sum(axis=1) / jnp.maximum(finite.sum(axis=1), 1).astype(jnp.float32)
    count = jnp.maximum(valid.sum(), 1).astype(jnp.float32)
    mean = jnp.where(valid, scores, 0.0).sum() / count
    variance = jnp.where(valid, (scores - mean) ** 2, 0.0).sum() / count
    squares = sum((jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradient)), start=jnp.float32(0))
    nothing = jnp.float32(jnp.nan)
    return Metrics(
        generation=generation,
        mean_fitness=jnp.where(valid.any(), mean, nothing),
        best_fitness=jnp.where(valid.any(), jnp.where(valid, scores, -jnp.inf).max(), nothing),
        std_fitness=jnp.sqrt(variance),
        invalid=(~valid).sum(),
        skipped=~(valid.any() & jnp.isfinite(squares)),
        gradient_norm=jnp.sqrt(squares),
        sigma=sigma,
        fitness=fitness,
        aux=aux,
    )


def valid_members(fitness: Array) -> Array:
    """Members with a finite fitness [N], or a finite entry of [N, K]: bool [N]."""
    return jnp.isfinite(fitness).reshape(fitness.shape[0], -1).any(axis=1)


def of_valid(valid: Array, new: Any, old: Any) -> Any:
    """The new member state [P, 2, ...] where the member is valid, the old one where it is not."""

    def choose(new, old):
        return jnp.where(valid.reshape(*new.shape[:2], *[1] * (new.ndim - 2)), new, old)

    return jax.tree.map(choose, new, old)


def reduce_aux(reductions: Any, aux: Any, valid: Array) -> Any:
    """Reduce aux values over the valid members.

    Args:
        reductions: names out of `REDUCTIONS`, a tree prefix of `aux`, or None.
        aux: pytree with leading axes [P, 2].
        valid: bool [N].

    Returns:
        The reduced pytree; "all" keeps [N, ...].
    """
    if reductions is None or aux is None:
        return None

    def reduce(name, subtree):
        return jax.tree.map(lambda x: _reduce(name, x.reshape(valid.shape[0], *x.shape[2:]), valid), subtree)

    return jax.tree.map(reduce, reductions, aux)


def _reduce(name: str, values: Array, valid: Array) -> Array:
    """Reduce [N, ...] over the members whose fitness is finite."""
    if name == "all":
        return values
    mask = valid.reshape(-1, *([1] * (values.ndim - 1)))
    if name in ("sum", "mean"):
        total = jnp.where(mask, values, jnp.zeros_like(values)).sum(axis=0)
        return total if name == "sum" else total / jnp.maximum(valid.sum(), 1).astype(jnp.float32)
    limits = jnp.finfo(values.dtype) if jnp.issubdtype(values.dtype, jnp.floating) else jnp.iinfo(values.dtype)
    if name == "max":
        return jnp.where(mask, values, jnp.asarray(limits.min, values.dtype)).max(axis=0)
    return jnp.where(mask, values, jnp.asarray(limits.max, values.dtype)).min(axis=0)
