"""What an update reports."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from eggroll import programs
from eggroll.noise.leaves import FrozenLeaf, LeafPlan
from eggroll.noise.plan import Plan
from eggroll.update.blocks import BASE, Counts


class UpdateReport(NamedTuple):
    """What an update did."""

    skipped: Array  # bool [], nothing changed: the coefficients or sigma were not finite
    gradient_norm: Array  # float32 []
    leaf_norms: Array  # float32 [leaves], gradient norm of every leaf in the order of the plan
    moved: Array  # float32 [], share of the stored weights that changed their value
    kept: Array  # int32 [], blocks of parameters that kept their old values, the new ones not being finite
    update_over_sigma: Array  # float32 [], root mean square of the update of a weight, in units of its sigma; NaN: not known
    update_over_weights: Array  # float32 [], norm of the update over `weight_norm`; NaN: not known
    weight_norm: Array  # float32 [], norm of all perturbed weights after the update; NaN: not known
    checksums: Array  # uint32 [2, arrays], before and after the update: see `checksums`


def report_deferred(skipped: Array, checksums: Array) -> UpdateReport:
    """Report of an update that is still to be made: nothing else is known of it."""
    unknown = jnp.float32(jnp.nan)
    return UpdateReport(
        skipped,
        gradient_norm=unknown,
        leaf_norms=jnp.zeros(0, jnp.float32),
        moved=unknown,
        kept=jnp.int32(0),
        update_over_sigma=unknown,
        update_over_weights=unknown,
        weight_norm=unknown,
        checksums=checksums,
    )


def summarise(plan: Plan, counts: Sequence[Counts], checksums: Array, skipped: Array | None, sigma: Array | None) -> Any:
    """Join the counts of all parameters: an `UpdateReport`; counts of int8 parameters, which `make_report` takes."""
    stacked: Any = jax.tree.map(lambda *parts: jnp.stack(parts), *(count[:-1] for count in counts))
    together = Counts._make((*stacked, checksums))
    if plan.is_integer:
        return together
    assert skipped is not None and sigma is not None
    floating = [leaf for leaf in plan.leaves if leaf.quantised or jnp.issubdtype(leaf.dtype, jnp.floating)]
    moved = _as_float(together.moved).sum() / _count(floating)
    units = np.array([getattr(leaf.spec, "sigma_multiplier", 1.0) for leaf in plan.leaves], np.float32)
    perturbed = _count([leaf for leaf in floating if not isinstance(leaf, FrozenLeaf)])
    return UpdateReport(
        skipped=skipped,
        gradient_norm=jnp.sqrt(together.squares.sum()),
        leaf_norms=jnp.sqrt(together.squares),
        moved=moved,
        kept=together.kept.sum(),
        update_over_sigma=jnp.sqrt((together.steps / units**2).sum() / perturbed) / sigma,
        update_over_weights=jnp.sqrt(together.steps.sum() / together.weights.sum()),
        weight_norm=jnp.sqrt(together.weights.sum()),
        checksums=checksums,
    )


def _count(leaves: Sequence[LeafPlan]) -> float:
    return max(1.0, float(sum(math.prod(leaf.shape) for leaf in leaves)))


def _as_float(moved: Array) -> Array:
    """Counts of weights, int32 [..., 2], as float32."""
    return moved[..., 0].astype(jnp.float32) * BASE + moved[..., 1].astype(jnp.float32)


def round_coefficients(plan: Plan, coefficients: Array, shaping: Any) -> Array:
    """Round the coefficients to whole numbers, 0 for NaN, where the parameters are int8."""
    if not plan.is_integer:
        return coefficients
    return jnp.nan_to_num(coefficients).astype(jnp.int8 if shaping == "pair_sign" else jnp.int32)


def make_report(plan: Plan, done: Any) -> UpdateReport:
    """Make the report of an update. Norms of int8 parameters are those of the steps: square roots of how many moved."""
    if not plan.is_integer:
        return done
    count = _count([leaf for leaf in plan.leaves if leaf.integer])
    program = programs.compile_once("report of integers", count, function=functools.partial(_norms_of_steps, count))
    norm, norms, share = program(done.moved)
    return report_deferred(jnp.bool_(False), done.checksums)._replace(gradient_norm=norm, leaf_norms=norms, moved=share)


def _norms_of_steps(count: float, moved: Array) -> tuple[Array, Array, Array]:
    """Norms of the gradient, whole and by leaf, and the share of `count` weights that moved."""
    counts = _as_float(moved)
    return jnp.sqrt(counts.sum()), jnp.sqrt(counts), counts.sum() / count
