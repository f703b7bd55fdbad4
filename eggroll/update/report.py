"""What an update reports."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from eggroll.noise.plan import Plan
from eggroll.update.blocks import BASE, Counts


class UpdateReport(NamedTuple):
    """What an update did."""

    skipped: Array  # bool [], nothing changed: the coefficients or sigma were not finite
    gradient_norm: Array  # float32 []
    leaf_norms: Array  # float32 [leaves], gradient norm of every leaf in the order of the plan
    moved: Array  # float32 [], share of the stored weights that changed their value
    kept: Array  # int32 [], blocks of parameters that kept their old values, the new ones not being finite


def summarise(plan: Plan, counts: Sequence[Counts], skipped: Array | None) -> Any:
    """Join the counts of all parameters: an `UpdateReport`; counts of int8 parameters, which `make_report` takes."""
    together = jax.tree.map(lambda *parts: jnp.stack(parts), *counts)
    if plan.is_integer:
        return together
    assert skipped is not None
    size = sum(math.prod(leaf.shape) for leaf in plan.leaves if leaf.quantised or jnp.issubdtype(leaf.dtype, jnp.floating))
    moved = _as_float(together.moved).sum() / max(1.0, float(size))
    norms = jnp.sqrt(together.squares)
    return UpdateReport(skipped, jnp.sqrt(together.squares.sum()), norms, moved, together.kept.sum())


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
    counts = _as_float(done.moved)
    size = float(sum(math.prod(leaf.shape) for leaf in plan.leaves if leaf.integer))
    return UpdateReport(jnp.bool_(False), jnp.sqrt(counts.sum()), jnp.sqrt(counts), counts.sum() / size, jnp.int32(0))
