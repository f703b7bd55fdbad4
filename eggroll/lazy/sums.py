"""Sums over the entries of a parameter, or of their squares, from its factors: no member builds it for a penalty or a norm.

    sum W     ->  sum W + scale sum (left right^T)
    sum W^2   ->  sum W^2 + 2 scale sum (W o left right^T) + scale^2 sum (left right^T)^2

over any of the axes. `Squared` waits for such a sum; any other use of it reads the parameter.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from eggroll.lazy.low_rank import FlipoutDelta, IntegerDelta, LowRankDelta
from eggroll.lazy.perturbed import LazyArray, PerturbedArray, register
from eggroll.lazy.probe import Probe
from eggroll.noise.leaves import at_least_float32


class Squared(LazyArray):
    """The squares of a parameter's entries."""

    value: PerturbedArray

    def aval(self) -> Any:
        """Abstract value of the squares."""
        return self.value.aval()

    def source(self) -> str:
        """The path of the parameter."""
        return self.value.source()

    def sliceable(self) -> "Squared":
        """The squares of what `scan` may slice."""
        return Squared(self.value.sliceable())

    def read(self, where: str, reason: str, *, moves: bool) -> Array:
        """Return the squares of what an operation without a rule reads."""
        return jnp.square(self.value.read(where, reason, moves=moves))


def square(value: Any) -> Squared | None:
    """The squares of a value whose sums have a closed form; None for any other."""
    return Squared(value) if isinstance(value, PerturbedArray) and _has_sums(value) else None


def _has_sums(value: PerturbedArray) -> bool:
    has_factors = isinstance(value.delta, LowRankDelta) and not isinstance(value.delta, FlipoutDelta | IntegerDelta)
    return (has_factors or isinstance(value.delta, Probe)) and bool(jnp.issubdtype(value.base.dtype, jnp.floating))


@register(jax.lax.square_p)
def _square(value: LazyArray, **params: Any) -> Any:
    squared = square(value)
    return LazyArray.default(jax.lax.square_p, [value], params) if squared is None else squared


@register(jax.lax.integer_pow_p)
def _power(value: LazyArray, *, y: int) -> Any:
    squared = square(value) if y == 2 else None
    return LazyArray.default(jax.lax.integer_pow_p, [value], {"y": y}) if squared is None else squared


@register(jax.lax.reduce_sum_p)
def _sum(value: PerturbedArray | Squared, *, axes: Sequence[int], **params: Any) -> Array:
    inner = value.value if isinstance(value, Squared) else value
    if not _has_sums(inner):
        return LazyArray.default(jax.lax.reduce_sum_p, [value], {"axes": axes, **params})
    base = inner.base
    if isinstance(inner.delta, Probe):
        inner.delta.note(inner, "its entries are summed")
        return jnp.sum(base, axes)
    assert isinstance(inner.delta, LowRankDelta)
    return _of_squares(inner, axes) if isinstance(value, Squared) else _of_entries(inner, axes)


def _terms(value: PerturbedArray, rank: int) -> list[Any]:
    """Operands of an einsum for the delta: its factors, with the label `rank`, and its scale."""
    assert isinstance(value.delta, LowRankDelta)
    wide, factors = at_least_float32(value.base.dtype), value.delta.arrange(value)
    left, right = factors.left.astype(wide), factors.right.astype(wide)
    scale = value.delta.scale.astype(wide), value.positions("scale")
    return [left, [*value.positions("left"), rank], right, [*value.positions("right"), rank], *scale]


def _of_entries(value: PerturbedArray, axes: Sequence[int]) -> Array:
    ndim = value.base.ndim
    kept = [axis for axis in range(ndim) if axis not in axes]
    term = _einsum(_terms(value, ndim), kept, value.base.shape)
    return jnp.sum(value.base, tuple(axes)) + term.astype(value.base.dtype)


def _of_squares(value: PerturbedArray, axes: Sequence[int]) -> Array:
    ndim, base = value.base.ndim, value.base.astype(at_least_float32(value.base.dtype))
    kept = [axis for axis in range(ndim) if axis not in axes]
    first, second = _terms(value, ndim), _terms(value, ndim + 1)
    cross = _einsum([base, [*range(ndim)], *first], kept, base.shape)
    own = _einsum([*first, *second], kept, base.shape)
    return (jnp.sum(jnp.square(base), tuple(axes)) + 2 * cross + own).astype(value.base.dtype)


def _einsum(operands: list[Any], kept: list[int], shape: Sequence[int]) -> Array:
    """The sum of products over all labels but `kept`, in full precision; some of those may be in no operand."""
    labels = {label for own in operands[1::2] for label in own}
    out = jnp.einsum(*operands, [axis for axis in kept if axis in labels], precision=jax.lax.Precision.HIGHEST)
    return out.reshape([shape[axis] if axis in labels else 1 for axis in kept])
