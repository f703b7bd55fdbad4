"""The plan: which noise every parameter gets, and why; data, which `eggroll.lazy.planning` makes from a function."""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax

from eggroll.noise.factored import FlipoutLeaf, LowRankLeaf
from eggroll.noise.leaves import FrozenLeaf, LeafPlan, PerturbedLeaf

HEADER = ("path", "shape", "role", "evaluated", "rank", "kernel", "bytes", "share", "work", "reason")
COSTLY = 0.1  # share of the parameters' bytes that a member may have copies of without a word


@dataclasses.dataclass(frozen=True)
class Plan:
    """The noise of every parameter, in the order of the parameter tree's leaves."""

    leaves: tuple[LeafPlan, ...]
    tree: Any  # jax.tree_util.PyTreeDef of the parameters
    update: str = ""  # how the optimizer lets the parameters be updated, for people
    digests: tuple[str, ...] = dataclasses.field(
        default=("", "", "", ""), compare=False
    )  # of the function, the optimizer's update, the schedule of sigma and the shaping; "": not known, or no function

    @property
    def max_rank(self) -> int:
        """The largest rank of the low-rank leaves, 1 when there is none."""
        return max((leaf.rank for leaf in self.leaves if isinstance(leaf, LowRankLeaf)), default=1)

    @property
    def is_integer(self) -> bool:
        """Whether the parameters that move are int8."""
        return any(leaf.integer for leaf in self.leaves)

    @property
    def quantised(self) -> tuple[bool, ...]:
        """Whether every leaf is an int8 parameter under floating noise."""
        return tuple(leaf.quantised for leaf in self.leaves)

    def table(self) -> str:
        """A readable table: how every parameter is evaluated, its noise and why; then what is frozen by default or costly."""
        lines = [_table(self.leaves), *_frozen_collections(self.leaves), *_costly(self.leaves)]
        return "\n".join(lines + ([f"update: {self.update}"] if self.update else []))

    @property
    def shapes(self) -> Any:
        """Shapes and dtypes of the parameters, as a pytree like them."""
        return jax.tree.unflatten(self.tree, [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in self.leaves])

    def check_uses(self, other: "Plan") -> None:
        """Compare with the plan of another function of the same parameters, which may leave some of them unused.

        Raises:
            ValueError: the other function uses a parameter in another way; the message names it.
        """
        for own, its in zip(self.leaves, other.leaves, strict=True):
            can_build = isinstance(own, LowRankLeaf) and own.spec == its.spec and not own.quantised and own.integer is None
            if can_build and isinstance(its, PerturbedLeaf):
                continue  # its members build the parameter where its noise is not of the use's own split
            if not isinstance(its, FrozenLeaf) and _uses(own) != _uses(its):
                remedy = (
                    "Call plan(state, batch, function=...) first, with a function that uses all parameters"
                    if isinstance(own, FrozenLeaf)
                    else f"Add the rule ('{own.path}', eggroll.Dense()) to `perturbation`"
                )
                raise ValueError(
                    f"the function uses parameter '{own.path}' as {its.role} ({its.reason}), but the plan, made for the "
                    f"function that came first, has it as {own.role} ({own.reason}). {remedy}, or use a separate strategy for "
                    "the function."
                )


def _uses(leaf: LeafPlan) -> tuple:
    return leaf.role, leaf.axes, leaf.converted


def _table(leaves: Sequence[LeafPlan]) -> str:
    """A line for every parameter, and the bytes of noise of one member.

    "share" is that of these bytes; "work" the multiplications of a product with the noise next to those with the parameter.
    """
    total = sum(leaf.noise_bytes for leaf in leaves)
    rows = [HEADER, *(_row(leaf, total) for leaf in leaves)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    shared = sum(math.prod(leaf.shape) * leaf.noise_dtype.itemsize for leaf in leaves if isinstance(leaf, FlipoutLeaf))
    lines += [f"noise of all members: {shared:,} bytes"] if shared else []
    return "\n".join([*lines, f"noise per member: {total:,} bytes"])


def _frozen_collections(leaves: Sequence[LeafPlan]) -> list[str]:
    """A line for every kind of collections that are frozen because they are not parameters."""
    counts = Counter(leaf.collection for leaf in leaves if isinstance(leaf, FrozenLeaf) and leaf.collection)
    kinds: dict[str, list[str]] = {}
    for collection, count in counts.items():
        kinds.setdefault(collection.kind, []).append(f"{collection.name} ({count} array{'s' * (count != 1)})")
    return [f"frozen: {', '.join(named)}, not parameters: {kind}" for kind, named in kinds.items()]


def _costly(leaves: Sequence[LeafPlan]) -> list[str]:
    """A line on the arrays of its own that a member has, where they are many, with the first use to change."""
    whole = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    copies, most = sum(leaf.copy_bytes for leaf in leaves), max(leaves, key=lambda leaf: leaf.copy_bytes)
    if copies <= COSTLY * whole:
        return []
    times = f"{copies / whole:.0%} of the parameters' bytes"
    return [f"costly: a member has arrays of its own of {times}; most are of '{most.path}': {most.built[0] or most.reason}"]


def _row(leaf: LeafPlan, total: int) -> tuple[str, ...]:
    rank = kernel = "-"
    if isinstance(leaf, LowRankLeaf):
        rank, kernel = str(leaf.rank), leaf.implementation
    reason = f"{leaf.reason}, int8 quantised" if leaf.quantised else leaf.reason
    reason += f"; also built per member: {leaf.built[0]}" if leaf.built[0] else ""
    share = f"{leaf.noise_bytes / total:.0%}" if total else "-"
    work = f"+{leaf.work:.0%}" if leaf.work else "-"
    return leaf.path, str(leaf.shape), leaf.role, leaf.evaluation, rank, kernel, f"{leaf.noise_bytes:,}", share, work, reason
