"""The plan: which noise every parameter gets, and why.

The role of a leaf is read from how the function uses it, by one abstract trace (no arithmetic): a leaf that is only contracted,
looked up or convolved, always over the same split of its axes, gets low-rank noise over (contracted axes) x (other axes); any
other leaf gets dense noise, and the plan says why. Rules on the parameter paths override ranks, distributions and scales.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from eggroll import implementation, integer, noise, plan_table
from eggroll.interpret import apply_perturbed
from eggroll.perturbed import Observer, UnsupportedUse, Use, perturb, probe
from eggroll.quantised import OffGrid
from eggroll.rules import (
    Dense,
    Flipout,
    Frozen,
    Integer,
    LowRank,
    Perturbation,
    Spec,
    check_params,
    match_rules,
    paths,
    quantised_leaves,
)


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """The noise of one parameter: `spec` says what was asked, `role` what the parameter gets, `reason` why."""

    path: str
    shape: tuple[int, ...]
    dtype: Any
    role: str  # "low-rank", "flipout", "dense" or "frozen"
    spec: Spec
    reason: str
    stack: tuple[int, ...] = ()  # axes with independent noise per index; the leading ones where the noise is dense
    rows: tuple[int, ...] = ()  # axes spanned by the left factor
    columns: tuple[int, ...] = ()  # axes spanned by the right factor
    implementation: str = "reference"  # of its products, "reference" or "mosaic_gpu"
    converted: Any = None  # floating dtype that the function converts a quantised parameter to; None of the others

    def sizes(self, axes: Sequence[int]) -> tuple[int, ...]:
        """Sizes of the given axes."""
        return tuple(self.shape[axis] for axis in axes)

    @property
    def quantised(self) -> bool:
        """Whether the parameter is int8 under floating noise."""
        return self.converted is not None

    @property
    def noise_dtype(self) -> Any:
        """Dtype of floating noise: the parameter's own, of a quantised one that which it is converted to."""
        return self.converted or self.dtype

    @property
    def where(self) -> dict[str, Any]:
        """How a lazy value is to lay the noise, for `perturbed.perturb`."""
        return dict(path=self.path, rows=self.rows, columns=self.columns, implementation=self.implementation)

    @property
    def factored(self) -> bool:
        """Whether a pair's noise is factors: low-rank, or the signs of Flipout."""
        return self.role in ("low-rank", "flipout")

    @property
    def distribution(self) -> str:
        """Of the values of a pair."""
        return "rademacher" if self.role == "flipout" else self.spec.distribution

    @property
    def values(self) -> int:
        """Random values per address: r (m + n) of a low-rank layer, m + n signs, the size of a dense one, 0 when frozen."""
        if self.role == "frozen":
            return 0
        if self.role == "dense":
            return math.prod(self.shape) // math.prod(self.sizes(self.stack))
        return self.spec.rank * (math.prod(self.sizes(self.rows)) + math.prod(self.sizes(self.columns)))

    @property
    def refresh(self) -> int:
        """Generations that share the right factor; 1 where there is none."""
        return self.spec.refresh if self.role == "low-rank" and isinstance(self.spec, LowRank) else 1

    @property
    def integer(self) -> integer.IntegerNoise | None:
        """What is known of the noise of an int8 parameter that is not frozen; None of the others."""
        if self.role == "frozen" or not isinstance(self.spec, Integer):
            return None
        rank, factors = (self.spec.rank, 2) if self.role == "low-rank" else (1, 1)
        return integer.IntegerNoise(self.spec.distribution, self.spec.shift, rank, factors, self.spec.update == "sign")

    @property
    def words(self) -> int:
        """Random words per address."""
        needed = integer.words_needed if self.integer else noise.words_needed
        return 0 if self.role == "frozen" else needed(self.values, self.distribution)

    @property
    def noise_bytes(self) -> int:
        """Bytes of noise one member holds for this leaf: packed signs, or values."""
        packed = self.factored and self.distribution == "rademacher" and not self.integer
        per_layer = 4 * self.words if packed else self.values * self.noise_dtype.itemsize
        return math.prod(self.sizes(self.stack)) * per_layer

    def decode(self, words: Array) -> noise.Factors | Array:
        """Turn this leaf's random words into its noise.

        Args:
            words: uint32 [*stack, self.words].

        Returns:
            `noise.Factors` [*stack, r, m], [*stack, r, n] for factors; an array of the leaf's shape for "dense".
        """
        distribution = self.distribution
        values = integer.decode(words, self.values, distribution=distribution) if self.integer else None
        if self.role == "dense":
            if values is None:
                values = noise.decode(words, self.values, distribution=distribution, dtype=self.noise_dtype)
            return values.reshape(self.shape)
        m, n = math.prod(self.sizes(self.rows)), math.prod(self.sizes(self.columns))
        if values is not None:
            return noise.split_factors(values, rank=self.spec.rank, m=m, n=n)
        return noise.decode_factors(words, rank=self.spec.rank, m=m, n=n, distribution=distribution, dtype=self.noise_dtype)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The noise of every parameter, in the order of the parameter tree's leaves."""

    leaves: tuple[LeafPlan, ...]
    tree: Any  # jax.tree_util.PyTreeDef of the parameters

    @property
    def max_rank(self) -> int:
        """The largest rank of the low-rank leaves, 1 when there is none."""
        return max((leaf.spec.rank for leaf in self.leaves if leaf.role == "low-rank"), default=1)

    @property
    def is_integer(self) -> bool:
        """Whether the parameters that move are int8."""
        return any(leaf.integer for leaf in self.leaves)

    @property
    def quantised(self) -> tuple[bool, ...]:
        """Whether every leaf is an int8 parameter under floating noise."""
        return tuple(leaf.quantised for leaf in self.leaves)

    def table(self) -> str:
        """A readable table: path, shape, role, rank, kernel, noise bytes per member, reason."""
        return plan_table.table(self.leaves)

    def check(self, params: Any) -> None:
        """Raise ValueError unless `params` has the shapes and dtypes this plan was made for."""
        leaves, tree = jax.tree.flatten(params)
        if tree != self.tree or any(
            (leaf.shape, leaf.dtype) != (p.shape, p.dtype) for leaf, p in zip(leaves, self.leaves, strict=True)
        ):
            raise ValueError("params differ in structure, shape or dtype from the parameters this strategy was planned for.")


def make_plan(function: Callable, params: Any, *args: Any, perturbation: Perturbation) -> Plan:
    """Read how `function(params, *args)` uses its parameters and decide each one's noise.

    Args:
        function: the one-member function; it is traced once, abstractly.
        params: pytree of arrays or `jax.ShapeDtypeStruct`.
        *args: one member's further arguments.
        perturbation: a spec for all leaves, or rules `[(pattern, spec), ...]` on the paths: `re.fullmatch`, first match wins.

    Returns:
        The plan.

    Raises:
        ValueError: an unused rule, a leaf without a rule, a leaf that cannot be perturbed, no perturbed leaf at all.
    """
    check_params(params, perturbation)
    leaf_paths, leaves = paths(params), jax.tree.leaves(params)
    specs = match_rules(perturbation, leaf_paths)
    grid = quantised_leaves(params, perturbation)
    seen = read_uses(function, params, *args, quantised=grid)
    planned = [
        _plan_leaf(path, leaf, spec, seen.uses.get(path, []), converted=seen.widest(path) if on_grid else None)
        for path, leaf, spec, on_grid in zip(leaf_paths, leaves, specs, grid, strict=True)
    ]
    if all(leaf.role == "frozen" for leaf in planned):
        raise ValueError("perturbation freezes every parameter, or the function uses none; at least one must be perturbed.")
    rehearsed = _rehearsed(function, planned, params, args)
    return Plan(tuple(map(_with_implementation, rehearsed)), jax.tree.structure(params))


def _rehearsed(function: Callable, planned: list[LeafPlan], params: Any, args: tuple) -> list[LeafPlan]:
    """Trace the function once with the planned lazy values; a leaf whose use turns out to have no rule gets dense noise."""

    def perturbed(planned, params, *args):
        leaves, tree = jax.tree.flatten(params)
        lazy = [_placeholder(own, leaf) for own, leaf in zip(planned, leaves, strict=True)]
        return apply_perturbed(function, jax.tree.unflatten(tree, lazy), *args)

    while True:
        try:
            jax.eval_shape(functools.partial(perturbed, planned), params, *args)
            return planned
        except UnsupportedUse as error:
            reason = f"used in {error.where}, which has no low-rank rule"
            planned = [_as_dense(leaf, reason) if leaf.path == error.path else leaf for leaf in planned]


def _with_implementation(leaf: LeafPlan) -> LeafPlan:
    if leaf.role != "low-rank":
        return leaf
    side_by_side = len(leaf.rows) == 1 and leaf.columns == (leaf.rows[0] + 1,)  # as [m, n], which the kernels read
    covered = side_by_side and not leaf.quantised
    return dataclasses.replace(leaf, implementation=implementation.chosen(leaf, covered=covered))


def _as_dense(leaf: LeafPlan, reason: str) -> LeafPlan:
    return dataclasses.replace(leaf, role="dense", reason=reason, stack=(), rows=(), columns=())


def _placeholder(planned: LeafPlan, leaf: Array) -> Any:
    if planned.quantised and planned.role == "dense":
        return OffGrid(leaf.astype(planned.noise_dtype), planned.path)
    if not planned.factored:
        return leaf
    stack = planned.sizes(planned.stack)
    factors = planned.decode(jnp.zeros((*stack, planned.words), jnp.uint32))
    assert isinstance(factors, noise.Factors)
    scale = jnp.zeros(stack, jnp.int32 if planned.integer else jnp.float32)
    options = planned.where | {
        "shared": leaf.astype(planned.noise_dtype) if planned.role == "flipout" else None,
        "integer": planned.integer,
    }
    return perturb(leaf, factors, scale=scale, quantised=planned.converted, **options)


def read_uses(function: Callable, params: Any, *args: Any, quantised: Sequence[bool]) -> Observer:
    """Trace `function(params, *args)` abstractly; return what every parameter was used for. `quantised`: of every leaf."""
    observer = Observer()
    leaf_paths = paths(params)

    def observed(params, *args):
        leaves, tree = jax.tree.flatten(params)
        probes = [
            probe(leaf, path=path, observer=observer, quantised=on_grid)
            for leaf, path, on_grid in zip(leaves, leaf_paths, quantised, strict=True)
        ]
        return apply_perturbed(function, jax.tree.unflatten(tree, probes), *args)

    jax.eval_shape(observed, params, *args)
    return observer


def _plan_leaf(path: str, leaf: Any, spec: Spec, uses: list[Use], *, converted: Any) -> LeafPlan:
    planned = LeafPlan(path, tuple(leaf.shape), leaf.dtype, "dense", spec, "", converted=converted)
    if isinstance(spec, Frozen):
        return dataclasses.replace(planned, role="frozen", reason="by rule")
    if not uses:
        return dataclasses.replace(planned, role="frozen", reason="not used by the function")
    if isinstance(spec, Dense):
        return dataclasses.replace(planned, reason="by rule")
    stack, rows, columns, reason = _split(leaf.shape, uses)
    if reason:
        return dataclasses.replace(planned, reason=reason)
    note = f"{_axes(rows)} x {_axes(columns)}" + (f", stacked over {_axes(stack)}" if stack else "")
    note += ", used twice" if len(uses) == 2 else f", used {len(uses)} times" if len(uses) > 2 else ""
    role = "flipout" if isinstance(spec, Flipout) else "low-rank"
    planned = dataclasses.replace(planned, role=role, reason=note, stack=stack, rows=rows, columns=columns)
    if planned.integer:
        planned.integer.check_width(path, max(math.prod(planned.sizes(tuple(use.contracted))) for use in uses))
    return planned


def _axes(axes: Sequence[int]) -> str:
    return f"axes {','.join(map(str, axes))}" if len(axes) > 1 else f"axis {axes[0]}"


def _split(shape: Sequence[int], uses: list[Use]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], str]:
    """Return (stack, rows, columns, reason for dense noise or "")."""
    unsupported = [use.unsupported for use in uses if use.unsupported]
    if unsupported:
        return (), (), (), unsupported[0]
    first = uses[0]
    if any({use.contracted, use.free} != {first.contracted, first.free} or use.stacked != first.stacked for use in uses):
        return (), (), (), "used with different splits of its axes"
    stack, rows, columns = (tuple(sorted(axes)) for axes in (first.stacked, first.contracted, first.free))
    if math.prod(shape[a] for a in rows) == 1 or math.prod(shape[a] for a in columns) == 1:
        return (), (), (), "a vector" if len(shape) == 1 else "one row or column: a vector"
    return stack, rows, columns, ""
