"""The plan: which noise every parameter gets, and why.

The role of a leaf is read from how the function uses it, by one abstract trace (no arithmetic):

    contracted, looked up or convolved    low-rank noise over (contracted axes) x (other axes); members build it for other uses
    never, but read in small slices       low-rank noise, of which members build the slices
    never, a large matrix                 "built": low-rank noise, which every member adds to a copy of the parameter
    never, a vector or a small matrix     dense noise

The plan says why. Rules on the parameter paths override ranks, distributions and scales.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from eggroll.digests import digest
from eggroll.lazy import kernels
from eggroll.lazy.interpret import apply_perturbed
from eggroll.lazy.low_rank import perturb
from eggroll.lazy.perturbed import recording_builds
from eggroll.lazy.probe import probe
from eggroll.lazy.quantised import OffGrid
from eggroll.lazy.uses import Observer, UnsupportedUse, Use
from eggroll.noise.draws import Flipped
from eggroll.noise.factored import BuiltLeaf, FactoredLeaf, FlipoutLeaf, LowRankLeaf
from eggroll.noise.leaves import AxesOfNoise, DenseLeaf, FrozenLeaf, LeafPlan, PerturbedLeaf
from eggroll.noise.plan import Plan
from eggroll.noise.rules import (
    Dense,
    Flipout,
    Frozen,
    LowRank,
    Noisy,
    Perturbation,
    check_params,
    match_rules,
    paths,
    quantised_leaves,
)
from eggroll.noise.variables import Collection, collections

FEWER = 4  # low-rank noise that members build, or read in slices, has at most a fourth of the values of dense noise


def make_plan(function: Callable, params: Any, *args: Any, perturbation: Perturbation, allow_kernels: bool = True) -> Plan:
    """Read how `function(params, *args)` uses its parameters and decide each one's noise.

    Args:
        function: the one-member function; it is traced once, abstractly.
        params: pytree of arrays or `jax.ShapeDtypeStruct`.
        *args: one member's further arguments.
        perturbation: a spec for all leaves, or rules `[(pattern, spec), ...]` on the paths: `re.fullmatch`, first match wins.
        allow_kernels: not where the partitioner shards weights, which it would gather for a kernel.

    Returns:
        The plan.

    Raises:
        ValueError: an unused rule, a leaf without a rule, a leaf that cannot be perturbed, no perturbed leaf at all.
    """
    check_params(params, perturbation)
    leaf_paths, leaves = paths(params), jax.tree.leaves(params)
    specs = match_rules(perturbation, params)
    grid = quantised_leaves(params, perturbation)
    seen = read_uses(function, params, *args, quantised=grid, frozen=[isinstance(spec, Frozen) for spec in specs])
    planned = [
        _freeze(path, leaf, spec, collection)
        if isinstance(spec, Frozen)
        else _plan_leaf(path, leaf, spec, seen.uses.get(path, []), converted=seen.widest(path) if on_grid else None)
        for path, leaf, spec, on_grid, collection in zip(leaf_paths, leaves, specs, grid, collections(params), strict=True)
    ]
    if all(isinstance(leaf, FrozenLeaf) for leaf in planned):
        raise ValueError("perturbation freezes every parameter, or the function uses none; at least one must be perturbed.")
    rehearsed = _rehearse(function, planned, params, args)
    chosen = tuple(_with_implementation(leaf, allow_kernels) for leaf in rehearsed)
    return Plan(chosen, jax.tree.structure(params), digests=(digest(function, params, *args), "", "", ""))


def _rehearse(function: Callable, planned: list[LeafPlan], params: Any, args: tuple) -> list[LeafPlan]:
    """Trace the function once with the planned lazy values; note what members build, make dense what cannot be built."""

    def perturbed(planned, params, *args):
        leaves, tree = jax.tree.flatten(params)
        lazy = [_placeholder(own, leaf) for own, leaf in zip(planned, leaves, strict=True)]
        return apply_perturbed(function, jax.tree.unflatten(tree, lazy), *args)

    while True:
        try:
            with recording_builds() as builds:
                jax.eval_shape(functools.partial(perturbed, planned), params, *args)
            return [dataclasses.replace(leaf, built=builds.get(leaf.path, ("", 0))) for leaf in planned]
        except UnsupportedUse as error:
            reason = f"used in {error.where}, which has no low-rank rule"
            planned = [
                _as_dense(leaf, reason) if isinstance(leaf, PerturbedLeaf) and leaf.path == error.path else leaf
                for leaf in planned
            ]


def _with_implementation(leaf: LeafPlan, allowed: bool) -> LeafPlan:
    if not isinstance(leaf, LowRankLeaf) or isinstance(leaf, BuiltLeaf):
        return leaf
    if not allowed:
        if leaf.spec.implementation not in (None, "reference"):
            raise NotImplementedError(
                f"parameter '{leaf.path}' asks for implementation {leaf.spec.implementation!r}, which would gather its weights "
                "on a mesh with the axis 'model': use None or 'reference'."
            )
        return leaf
    side_by_side = len(leaf.rows) == 1 and leaf.columns == (leaf.rows[0] + 1,)  # as [m, n], which the kernels read
    covered = side_by_side and not leaf.quantised
    return dataclasses.replace(leaf, implementation=kernels.choose_implementation(leaf, covered=covered))


def _as_dense(leaf: PerturbedLeaf, reason: str) -> DenseLeaf:
    return DenseLeaf(leaf.path, leaf.shape, leaf.dtype, leaf.spec, reason, converted=leaf.converted)


def _placeholder(planned: LeafPlan, leaf: Array) -> Any:
    """What the function sees for a leaf, with zeros for the random words."""
    if planned.quantised and isinstance(planned, DenseLeaf):
        return OffGrid(leaf.astype(planned.noise_dtype), planned.path)
    if not isinstance(planned, FactoredLeaf) or isinstance(planned, BuiltLeaf):
        return leaf
    stack = planned.sizes(planned.stack)
    factors = planned.decode(jnp.zeros((*stack, planned.words), jnp.uint32))
    scale = jnp.zeros(stack, jnp.int32 if planned.integer else jnp.float32)
    is_flipout = isinstance(planned, FlipoutLeaf)
    noise = Flipped(leaf.astype(planned.noise_dtype), factors) if is_flipout else factors
    return perturb(planned, leaf, noise, scale=scale)


def read_uses(function: Callable, params: Any, *args: Any, quantised: Sequence[bool], frozen: Sequence[bool]) -> Observer:
    """Trace `function(params, *args)` abstractly; return what every parameter that is not frozen was used for."""
    observer = Observer()
    leaf_paths = paths(params)

    def observed(params, *args):
        leaves, tree = jax.tree.flatten(params)
        probes = [
            leaf if stays else probe(leaf, path=path, observer=observer, quantised=on_grid)
            for leaf, path, on_grid, stays in zip(leaves, leaf_paths, quantised, frozen, strict=True)
        ]
        return apply_perturbed(function, jax.tree.unflatten(tree, probes), *args)

    jax.eval_shape(observed, params, *args)
    return observer


def _freeze(path: str, leaf: Any, spec: Frozen, collection: Collection | None) -> FrozenLeaf:
    reason = f"not a parameter: {collection.name}" if collection else "by rule"
    return FrozenLeaf(path, tuple(leaf.shape), leaf.dtype, spec, reason, collection=collection)


def _plan_leaf(path: str, leaf: Any, spec: Noisy, uses: list[Use], *, converted: Any) -> LeafPlan:
    about = path, tuple(leaf.shape), leaf.dtype
    if not uses:
        return FrozenLeaf(*about, spec, "not used by the function", converted)
    if isinstance(spec, Dense):
        return DenseLeaf(*about, spec, "by rule", converted)
    if 0 in leaf.shape:
        return DenseLeaf(*about, spec, "has no entries", converted)
    can_build = converted is None and isinstance(spec, LowRank)
    stack, rows, columns, reason = _split(leaf.shape, uses, can_build=can_build)
    if reason and can_build and isinstance(spec, LowRank) and (chosen := _balanced_split(leaf.shape, uses, spec.rank)):
        layer = math.prod(leaf.shape[axis] for axis in (*chosen[1], *chosen[2]))
        if all(use.size * FEWER <= layer for use in uses):
            return LowRankLeaf(*about, spec, f"{_axes_of(chosen)}, read in slices: {reason}", converted, *chosen)
        return BuiltLeaf(*about, spec, f"{_axes_of(chosen)}: {reason}", converted, *chosen)
    if reason:
        return DenseLeaf(*about, spec, reason, converted)
    note = _axes_of((stack, rows, columns))
    note += ", used twice" if len(uses) == 2 else f", used {len(uses)} times" if len(uses) > 2 else ""
    if isinstance(spec, Flipout):
        return FlipoutLeaf(*about, spec, note, converted, stack, rows, columns)
    planned = LowRankLeaf(*about, spec, note, converted, stack, rows, columns)
    if planned.integer:
        planned.integer.check_width(path, max(math.prod(planned.sizes(tuple(use.contracted))) for use in uses))
    return planned


def _axes_of(split: AxesOfNoise) -> str:
    stack, rows, columns = split
    return f"{_axes(rows)} x {_axes(columns)}" + (f", stacked over {_axes(stack)}" if stack else "")


def _axes(axes: Sequence[int]) -> str:
    return f"axes {','.join(map(str, axes))}" if len(axes) > 1 else f"axis {axes[0]}"


def _balanced_split(shape: Sequence[int], uses: list[Use], rank: int) -> AxesOfNoise | None:
    """Stacked axes, rows and columns for factors of the fewest values; None where dense noise has not many more of them."""
    stack = tuple(sorted(frozenset.intersection(*(use.stacked for use in uses))))
    rest = [axis for axis in range(len(shape)) if axis not in stack]
    sizes = [shape[axis] for axis in rest]
    values, cut = min((math.prod(sizes[:k]) + math.prod(sizes[k:]), k) for k in range(len(rest) + 1))
    return (stack, tuple(rest[:cut]), tuple(rest[cut:])) if rank * values * FEWER <= math.prod(sizes) else None


def _split(
    shape: Sequence[int], uses: list[Use], *, can_build: bool
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], str]:
    """Return (stack, rows, columns, reason for dense noise or ""); with `can_build` other uses build what they read."""
    lazy = [use for use in uses if not use.unsupported]
    others = [use.unsupported for use in uses if use.unsupported]
    others += ["used with different splits of its axes"] * any(not _is_like(use, lazy[0]) for use in lazy)
    if others and not (can_build and lazy):
        return (), (), (), others[0]
    stack, rows, columns = (tuple(sorted(axes)) for axes in (lazy[0].stacked, lazy[0].contracted, lazy[0].free))
    if math.prod(shape[a] for a in rows) == 1 or math.prod(shape[a] for a in columns) == 1:
        return (), (), (), "a vector" if len(shape) == 1 else "one row or column: a vector"
    return stack, rows, columns, ""


def _is_like(use: Use, other: Use) -> bool:
    """Whether two uses split the axes alike; the transposed matrix is the same matrix."""
    return {use.contracted, use.free} == {other.contracted, other.free} and use.stacked == other.stacked
