"""The plan: which noise every parameter gets, and why; data, which `eggroll.lazy.planning` makes from a function."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax import Array

from eggroll.noise import addresses, integer
from eggroll.noise.rules import (
    Integer,
    LowRank,
    Spec,
)

HEADER = ("path", "shape", "role", "rank", "kernel", "bytes", "reason")


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
        needed = integer.words_needed if self.integer else addresses.words_needed
        return 0 if self.role == "frozen" else needed(self.values, self.distribution)

    @property
    def noise_bytes(self) -> int:
        """Bytes of noise one member holds for this leaf: packed signs, or values."""
        packed = self.factored and self.distribution == "rademacher" and not self.integer
        per_layer = 4 * self.words if packed else self.values * self.noise_dtype.itemsize
        return math.prod(self.sizes(self.stack)) * per_layer

    def decode(self, words: Array) -> addresses.Factors | Array:
        """Turn this leaf's random words into its noise.

        Args:
            words: uint32 [*stack, self.words].

        Returns:
            `addresses.Factors` [*stack, r, m], [*stack, r, n] for factors; an array of the leaf's shape for "dense".
        """
        distribution = self.distribution
        values = integer.decode(words, self.values, distribution=distribution) if self.integer else None
        if self.role == "dense":
            if values is None:
                values = addresses.decode(words, self.values, distribution=distribution, dtype=self.noise_dtype)
            return values.reshape(self.shape)
        m, n = math.prod(self.sizes(self.rows)), math.prod(self.sizes(self.columns))
        if values is not None:
            return addresses.split_factors(values, rank=self.spec.rank, m=m, n=n)
        return addresses.decode_factors(words, rank=self.spec.rank, m=m, n=n, distribution=distribution, dtype=self.noise_dtype)


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
        return _table(self.leaves)

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
            if its.role != "frozen" and _uses(own) != _uses(its):
                raise ValueError(
                    f"the function uses parameter '{own.path}' as {its.role} ({its.reason}), but the plan, made for the "
                    f"function that came first, has it as {own.role} ({own.reason}). Add the rule "
                    f"('{own.path}', eggroll.Dense()) to `perturbation`, or give the function a strategy of its own."
                )


def _uses(leaf: LeafPlan) -> tuple:
    return leaf.role, leaf.stack, leaf.rows, leaf.columns, leaf.converted


def _table(leaves: Sequence[LeafPlan]) -> str:
    """A line for every parameter, and the bytes of noise of one member."""
    rows = [HEADER, *map(_row, leaves)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    total = sum(leaf.noise_bytes for leaf in leaves)
    shared = sum(math.prod(leaf.shape) * leaf.noise_dtype.itemsize for leaf in leaves if leaf.role == "flipout")
    lines += [f"noise of all members: {shared:,} bytes"] if shared else []
    return "\n".join([*lines, f"noise per member: {total:,} bytes"])


def _row(leaf: LeafPlan) -> tuple[str, ...]:
    rank = kernel = "-"
    if leaf.role == "low-rank" and isinstance(leaf.spec, LowRank | Integer):
        rank, kernel = str(leaf.spec.rank), leaf.implementation
    reason = f"{leaf.reason}, int8 quantised" if leaf.quantised else leaf.reason
    return leaf.path, str(leaf.shape), leaf.role, rank, kernel, f"{leaf.noise_bytes:,}", reason
