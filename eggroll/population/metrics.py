"""What a generation reports: statistics of the fitness, and aux values reduced over the population."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from eggroll.noise.leaves import at_least_float32
from eggroll.noise.once import rounded_once

REDUCTIONS = ("sum", "mean", "max", "min", "all")


class FitnessReport(NamedTuple):
    """Summary of a population's fitness; statistics are over the members whose fitness is finite."""

    mean_fitness: Array  # float32 []
    best_fitness: Array  # float32 []
    std_fitness: Array  # float32 []
    invalid: Array  # int32 [], members whose fitness was not finite
    tied_pairs: Array  # float32 [], share of the pairs whose members have the same fitness and carry no information
    pair_correlation: Array  # float32 [], of the fitness of + and - members; near 1: the fitness is noise that pairs share
    effective_rank: Array  # float32 [], equal rank-one terms that the update of a matrix amounts to, at most P r
    coefficients: Array  # float32 [P], what the update is made of; NaN when every member is invalid
    fitness: Array  # float32 or int32 [N] or [N, K], raw
    aux: Any  # reduced over the valid members, or None


class Metrics(NamedTuple):
    """What one generation reports: `FitnessReport` and `update.UpdateReport`, and of which generation."""

    generation: Array  # int32 [], the generation just done
    sigma: Array  # float32 []
    mean_fitness: Array  # from here: see FitnessReport
    best_fitness: Array
    std_fitness: Array
    invalid: Array
    tied_pairs: Array
    pair_correlation: Array
    effective_rank: Array
    coefficients: Array
    fitness: Array | None  # None: not kept, as in a scan
    aux: Any
    skipped: Array  # from here: see UpdateReport
    gradient_norm: Array
    leaf_norms: Array
    moved: Array
    kept: Array
    update_over_sigma: Array
    update_over_weights: Array
    weight_norm: Array
    checksums: Array | None  # None: not known

    @property
    def scalars(self) -> dict[str, Array]:
        """The fields that are one number."""
        arrays = ("coefficients", "fitness", "aux", "leaf_norms", "checksums")
        return {name: value for name, value in self._asdict().items() if name not in arrays}


def report_fitness(fitness: Array, coefficients: Array, *, rank: int, aux: Any, scores: Array | None = None) -> FitnessReport:
    """Report a population.

    Args:
        fitness: raw, [N] or [N, K].
        coefficients: [P], differences of the shaped fitness; of int8 parameters whole numbers.
        rank: the largest rank of the perturbations.
        aux: reduced over the population.
        scores: like the fitness, in which members of a pair are compared; None: the fitness.

    Returns:
        The report; where no member is valid its statistics are NaN.
    """
    valid = valid_members(fitness)
    wide, coefficients = at_least_float32(fitness.dtype), coefficients.astype(jnp.float32)
    members, unit = _mean_of_columns(fitness.astype(wide))
    count = jnp.maximum(valid.sum(), 1).astype(wide)
    mean = jnp.where(valid, members, 0.0).sum() / count
    variance = jnp.where(valid, (members - mean) ** 2, 0.0).sum() / count
    compared = members if scores is None else _mean_of_columns(scores.astype(wide))[0]
    compared = jnp.where(valid, compared, -jnp.inf)  # where shapings put a member without a fitness
    largest = jnp.abs(coefficients).max()
    weights = rounded_once(jnp.square(divide(coefficients, jnp.where(largest > 0, largest, 1.0))))
    nothing = jnp.float32(jnp.nan)
    return FitnessReport(
        mean_fitness=jnp.where(valid.any(), (unit * mean).astype(jnp.float32), nothing),
        best_fitness=jnp.where(valid.any(), (unit * jnp.where(valid, members, -jnp.inf).max()).astype(jnp.float32), nothing),
        std_fitness=(unit * jnp.sqrt(variance)).astype(jnp.float32),
        invalid=(~valid).sum(),
        tied_pairs=(compared[0::2] == compared[1::2]).astype(jnp.float32).mean(),
        pair_correlation=_correlation(members[0::2], members[1::2], valid[0::2] & valid[1::2]).astype(jnp.float32),
        effective_rank=rank * weights.sum() ** 2 / jnp.maximum(jnp.square(weights).sum(), 1.0),  # the largest weight is 1, or 0
        coefficients=jnp.where(valid.any(), coefficients, nothing),
        fitness=fitness,
        aux=aux,
    )


def _mean_of_columns(fitness: Array) -> tuple[Array, Array]:
    """Mean of the finite columns of every member [N], and the unit that it is in: not 1 where squares would overflow."""
    columns = fitness.reshape(fitness.shape[0], -1)
    finite = jnp.isfinite(columns)
    known = jnp.where(finite, columns, 0.0)
    largest = jnp.abs(known).max()
    unit = jnp.where(largest > 1e15, largest, jnp.ones_like(largest))
    return divide(known, unit).sum(axis=1) / jnp.maximum(finite.sum(axis=1), 1).astype(columns.dtype), unit


def divide(values: Array, unit: Array) -> Array:
    """Values / unit, where the reciprocal of a large unit would underflow."""
    factor = jnp.where(unit > 1, 2.0**-64, 1.0).astype(values.dtype)
    return (values * factor) / (unit * factor)


def _correlation(plus: Array, minus: Array, valid: Array) -> Array:
    """Correlation of two vectors over the valid entries; 0 where one of them is constant."""
    count = jnp.maximum(valid.sum(), 1).astype(plus.dtype)
    plus, minus = (jnp.where(valid, x - jnp.where(valid, x, 0.0).sum() / count, 0.0) for x in (plus, minus))
    scale = jnp.sqrt(jnp.square(plus).sum() * jnp.square(minus).sum())
    return jnp.where(scale > 0, (plus * minus).sum() / jnp.where(scale > 0, scale, 1.0), 0.0)


def widen(values: Array) -> Array:
    """Values to be added: floats at least float32, others as they are."""
    return values.astype(at_least_float32(values.dtype)) if jnp.issubdtype(values.dtype, jnp.floating) else values


def valid_members(fitness: Array) -> Array:
    """Members with a finite fitness [N], or a finite entry of [N, K]: bool [N]."""
    return jnp.isfinite(fitness).reshape(fitness.shape[0], -1).any(axis=1)


def keep_valid(valid: Array, new: Any, old: Any) -> Any:
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
        values = widen(values)
        total = jnp.where(mask, values, jnp.zeros_like(values)).sum(axis=0)
        return total if name == "sum" else total / jnp.maximum(valid.sum(), 1).astype(jnp.float32)
    if values.dtype == jnp.bool_:
        return (mask & values).any(axis=0) if name == "max" else (~mask | values).all(axis=0)
    limits = jnp.finfo(values.dtype) if jnp.issubdtype(values.dtype, jnp.floating) else jnp.iinfo(values.dtype)
    if name == "max":
        return jnp.where(mask, values, jnp.asarray(limits.min, values.dtype)).max(axis=0)
    return jnp.where(mask, values, jnp.asarray(limits.max, values.dtype)).min(axis=0)
