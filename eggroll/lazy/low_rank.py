"""The low-rank deltas, and how their factors are kept.

    LowRankDelta    scale * left right^T        left [stack, rows, r], right [stack, columns, r]
    FlipoutDelta    scale * shared o left right^T, where the members share noise of the base's shape
    IntegerDelta    sign * left right^T in fixed point, of an int8 parameter under `Integer`

Factors are `Arranged` as the base's axes are, or `Packed`: signs of Rademacher factors, 32 in a word.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import equinox as eqx
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from eggroll.kernels.factors import Signs, Values
from eggroll.kernels.flipout_dot.reference import flipout_product
from eggroll.kernels.lowrank_dot.reference import lowrank_product
from eggroll.lazy.perturbed import Axes, Delta, Operation, PerturbedArray, record_build
from eggroll.lazy.quantised import QuantisedDelta
from eggroll.noise import addresses
from eggroll.noise.draws import Flipped
from eggroll.noise.factored import FactoredLeaf, LowRankLeaf
from eggroll.noise.integer import IntegerNoise
from eggroll.noise.leaves import at_least_float32
from eggroll.noise.once import computed_once

Side = tuple[str, Array]  # a factor's name and the factor


class Contraction(NamedTuple):
    """A product with a parameter: labels of all axes (one that two operands have is contracted or batched), and its dtype."""

    x: list[int]
    parameter: list[int]
    first: list[int]  # of the factor that spans the contracted axes
    second: list[int]  # of the other factor
    scale: list[int]
    out: list[int]
    precision: Any
    dtype: DTypeLike | None


class Arranged(eqx.Module):
    """Factors with their axes in the base's order, the rank last."""

    left: Array  # [stack and row axes in base order, r]
    right: Array  # [stack and column axes in base order, r]

    def of_matrix(self) -> Values:
        """The factors [r, m] and [r, n] of one matrix, as kernels read them."""
        return Values(self.left.T, self.right.T)


class Packed(eqx.Module):
    """Packed Rademacher signs of both factors."""

    words: Array  # uint32 [stack, words]

    def of_matrix(self) -> Signs:
        """The signs of one matrix, as kernels read them."""
        return Signs(self.words)


class LowRankDelta(Delta):
    """scale * left right^T."""

    factors: Arranged | Packed
    scale: Array  # [stack]
    rank: int = eqx.field(static=True)
    implementation: str = eqx.field(static=True)  # of products that have the form of a kernel's

    def arrange(self, value: PerturbedArray) -> Arranged:
        """The factors, unpacked where they are packed signs."""
        if isinstance(self.factors, Arranged):
            return self.factors
        sizes = list(zip(value.tags, value.base.shape, strict=True))
        m = math.prod(size for tag, size in sizes if value.axes.rows.issuperset(tag))
        n = math.prod(size for tag, size in sizes if value.axes.columns.issuperset(tag))
        packed = addresses.Factors(self.rank, m, n, None, None, self.factors.words)
        return _arrange(value, packed, value.base.dtype)

    def unpack(self, value: PerturbedArray) -> Self:
        """The same delta with its packed signs, if any, unpacked into factors."""
        return dataclasses.replace(self, factors=self.arrange(value))

    def prepare_for_loops(self, value: PerturbedArray) -> Self:
        """The same delta, unpacked unless a kernel will use it: kernels unpack on read."""
        return self if self.implementation != "reference" else self.unpack(value)

    def prepare_slice(self) -> Self:
        """The same delta, its factors sliced once: XLA slices them again for every entry of what they are added to."""
        if isinstance(self.factors, Packed):
            return self
        factors = Arranged(computed_once(self.factors.left), computed_once(self.factors.right))
        return dataclasses.replace(self, factors=factors, scale=computed_once(self.scale))

    def map(self, operation: Operation) -> Self:
        """Apply `operation` to the factors and the scale."""
        assert isinstance(self.factors, Arranged)
        factors = Arranged(operation(self.factors.left, "left"), operation(self.factors.right, "right"))
        return dataclasses.replace(self, factors=factors, scale=operation(self.scale, "scale"))

    def read(self, value: PerturbedArray, where: str, reason: str, *, moves: bool) -> Array:
        """Build base + delta, an array of the member's own, for an operation without a rule."""
        record_build(value.axes.path, reason or f"used in {where}, which has no low-rank rule", value.base.size)
        factors, rank, wide = self.arrange(value), value.base.ndim, at_least_float32(value.base.dtype)
        term = jnp.einsum(
            factors.left.astype(wide),
            [*value.positions("left"), rank],
            factors.right.astype(wide),
            [*value.positions("right"), rank],
            self.scale.astype(wide),
            value.positions("scale"),
            list(range(rank)),
        )
        return (value.base.astype(wide) + term).astype(value.base.dtype)

    def sides(self, value: PerturbedArray, positions: Sequence[int], where: str) -> tuple[Side, Side]:
        """The factor that alone spans `positions` of `value`, and the other one; `where` is the use, for the error.

        Stacked axes among them, which both have, and inserted ones, which come from neither, do not matter.
        """
        factors = self.arrange(value)
        left, right = ("left", factors.left), ("right", factors.right)
        stacked = {*value.positions("left")} & {*value.positions("right")}
        for first, second in ((left, right), (right, left)):
            tags = [value.tags[axis] for axis in positions if axis not in stacked and value.tags[axis]]
            if all(value.axes.owns(first[0], tag) and not value.axes.owns(second[0], tag) for tag in tags):
                return first, second
        raise value.unsupported(where)

    def product(self, x: Array, first: Array, second: Array, labels: Contraction) -> Array:
        """x times the delta, in the dtype that `labels` ask for; `first` is the factor that shares the contracted axes."""
        return lowrank_product(
            x,
            first,
            second,
            scale=self.scale,
            x_axes=labels.x,
            first_axes=labels.first,
            second_axes=labels.second,
            scale_axes=labels.scale,
            out_axes=labels.out,
            precision=labels.precision,
            dtype=labels.dtype,
        )


class FlipoutDelta(LowRankDelta):
    """scale * shared o left right^T, of rank 1."""

    shared: Array  # like the base

    def sides(self, value: PerturbedArray, positions: Sequence[int], where: str) -> tuple[Side, Side]:
        """The factor that alone spans `positions`, and the other one; no stacked or inserted axis is summed."""
        if any(axis in value.positions("left") and axis in value.positions("right") for axis in positions) or any(
            not value.tags[axis] for axis in positions
        ):
            raise value.unsupported("a sum over a stacked or inserted axis, with shared noise")
        return super().sides(value, positions, where)

    def map(self, operation: Operation) -> Self:
        """Apply `operation` to the factors, the scale and the shared noise."""
        mapped = super().map(operation)
        return dataclasses.replace(mapped, shared=operation(self.shared, "shared"))

    def read(self, value: PerturbedArray, where: str, reason: str, *, moves: bool) -> Array:
        """Refuse: the plan gives the parameter dense noise, which costs as much."""
        raise value.unsupported(where)

    def product(self, x: Array, first: Array, second: Array, labels: Contraction) -> Array:
        """x times the delta."""
        return flipout_product(
            x,
            first,
            second,
            self.shared,
            scale=self.scale,
            x_axes=labels.x,
            first_axes=labels.first,
            second_axes=labels.second,
            shared_axes=labels.parameter,
            scale_axes=labels.scale,
            out_axes=labels.out,
            precision=labels.precision,
            dtype=labels.dtype,
        )


class IntegerDelta(LowRankDelta):
    """The low-rank delta of an int8 parameter, in fixed point; `scale` is the int32 sign."""

    noise: IntegerNoise = eqx.field(static=True)

    def read(self, value: PerturbedArray, where: str, reason: str, *, moves: bool) -> Array:
        """Refuse: fixed-point noise has no place between the integers of the base."""
        raise value.unsupported(where)

    def product(self, x: Array, first: Array, second: Array, labels: Contraction) -> Array:
        """x times the delta, in the units of a product with the parameter."""
        return self.noise.rescale(super().product(x, first, second, labels))


def perturb(planned: FactoredLeaf, base: Array, noise: addresses.Factors | Flipped, *, scale: Array) -> PerturbedArray:
    """Wrap a parameter with its perturbation.

    Args:
        planned: its plan.
        base: the parameter; its axes are stacked axes, rows and columns in any order.
        noise: of one pair, from `draws.draw_pair`: factors [stack, r, m] and [stack, r, n], packed or not.
        scale: [stack], sign * sigma * sigma_multiplier / sqrt(r); of integer noise the int32 sign.

    Returns:
        The lazy sum.
    """
    axes = Axes(
        planned.path,
        base.ndim,
        tuple((axis,) for axis in range(base.ndim)),
        frozenset(planned.rows),
        frozenset(planned.columns),
    )
    factors = noise.signs if isinstance(noise, Flipped) else noise
    value = PerturbedArray(base, Delta(), axes)
    kept = _arrange(value, factors, base.dtype) if factors.words is None else Packed(factors.words)
    implementation = planned.implementation if isinstance(planned, LowRankLeaf) else "reference"
    delta = LowRankDelta(kept, scale, factors.rank, implementation)
    if isinstance(noise, Flipped):
        delta = FlipoutDelta(kept, scale, factors.rank, implementation, noise.shared)
    elif planned.integer:
        delta = IntegerDelta(kept, scale, factors.rank, implementation, planned.integer)
    # Packed signs of stacked layers are unpacked layer by layer inside the scan over them; those of a single matrix at once,
    # outside any loop that uses it. A scan can slice packed signs only along leading axes.
    # A kernel reads them packed.
    stack = value.positions("scale")
    is_matrix = not stack and implementation != "reference"
    if not (is_matrix or (stack and stack == list(range(len(stack))))):
        delta = delta.unpack(value)
    return value.with_delta(QuantisedDelta(delta, planned.noise_dtype) if planned.quantised else delta)


def _arrange(value: PerturbedArray, factors: addresses.Factors, dtype: DTypeLike) -> Arranged:
    """Arrange factors [stack, r, m] and [stack, r, n] as the base's axes are, the rank last."""
    left, right = factors.unpack(dtype)
    stack, shape = value.positions("scale"), value.base.shape

    def arranged(factor: Array, component: str) -> Array:
        own = value.positions(component)
        spanned = [axis for axis in own if axis not in stack]
        factor = factor.reshape(*(shape[axis] for axis in stack), factors.rank, *(shape[axis] for axis in spanned))
        at = {axis: index for index, axis in enumerate(stack)}
        at |= {axis: len(stack) + 1 + index for index, axis in enumerate(spanned)}
        return computed_once(jnp.transpose(factor, [at[axis] for axis in own] + [len(stack)]))

    return Arranged(arranged(left, "left"), arranged(right, "right"))
