"""Quantised parameters: int8 to the function, perturbed between the integers.

    W = s Q           the function computes (x @ Q.astype(x.dtype)) * s, a member sees float(Q) + sigma E in place of Q

A matrix whose noise is factors stays a `PerturbedArray` of base Q with a `QuantisedDelta`; the conversion is a view that gives
base and factors the floating dtype, and the products that follow are those of any lazy parameter. Where there are no factors to
keep (dense noise, rows that were looked up before the conversion), the perturbed values are stored as `OffGrid`. Both may be
rearranged as int8 arrays, but not used in arithmetic: an integer cannot hold a perturbation finer than one.
"""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.extend.core as jexc
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from eggroll.lazy.perturbed import Delta, LazyArray, Operation, PerturbedArray, Tag, is_perturbed, register
from eggroll.lazy.uses import Observer, UnconvertedUse


class QuantisedDelta(Delta):
    """The delta of an int8 base that the function has not converted to a float yet."""

    converted: Delta  # what it is of the converted base
    dtype: Any = eqx.field(static=True)  # floating dtype of the noise

    @property
    def observer(self) -> Observer | None:
        """Records the uses of a probe; None for all other deltas."""
        return self.converted.observer

    def _with(self, converted: Delta) -> "QuantisedDelta":
        return QuantisedDelta(converted, self.dtype)

    def map(self, operation: Operation) -> "QuantisedDelta":
        """Apply `operation` to every component."""
        return self._with(self.converted.map(operation))

    def unpack(self, value: PerturbedArray) -> "QuantisedDelta":
        """The same delta with its packed signs, if any, unpacked into factors."""
        return self._with(self.converted.unpack(value))

    def prepare_for_loops(self, value: PerturbedArray) -> "QuantisedDelta":
        """The same delta in the form that a loop should read on every iteration."""
        return self._with(self.converted.prepare_for_loops(value))

    def prepare_slice(self) -> "QuantisedDelta":
        """The delta of a layer that a loop has sliced, in the form that its body should read."""
        return self._with(self.converted.prepare_slice())

    def mark_indexed(self, tag: Tag) -> "QuantisedDelta":
        """The same delta, after the axis tagged `tag` was indexed."""
        return self._with(self.converted.mark_indexed(tag))

    def read(self, value: PerturbedArray, where: str, reason: str, *, moves: bool) -> Array:
        """Reject arithmetic on the integers; otherwise read as the converted delta does."""
        if not moves:
            raise UnconvertedUse(value.axes.path, where)
        return self.converted.read(value, where, reason, moves=moves)

    def convert(self, value: PerturbedArray, dtype: DTypeLike) -> PerturbedArray:
        """The conversion of `value` to a floating dtype: a view, whose noise has the dtype too."""
        path = value.axes.path
        if not jnp.issubdtype(dtype, jnp.floating):
            raise UnconvertedUse(path, f"a conversion to {jnp.dtype(dtype)}")
        if self.observer is not None:
            self.observer.convert(path, dtype)

        def operation(array: Array, component: str) -> Array:
            return array if component == "scale" else array.astype(dtype)

        return value.with_delta(self.converted).view(value.tags, operation)


class OffGrid(LazyArray):
    """A value that the function treats as an int8 array, but whose entries lie between the integers."""

    values: Array  # floating
    path: str = eqx.field(static=True)
    observer: Observer | None = eqx.field(static=True, default=None)

    def aval(self) -> Any:
        """Abstract value: int8."""
        return jax.typeof(self.values).update(dtype=jnp.dtype(jnp.int8), weak_type=False)

    def materialise(self) -> Array:
        """Raise: the function asked for integers."""
        raise UnconvertedUse(self.path, "an operation that needs the whole array")

    def source(self) -> str:
        """The path of the parameter."""
        return self.path

    def read(self, where: str, reason: str, *, moves: bool) -> Array:
        """Reject arithmetic."""
        raise UnconvertedUse(self.path, where)

    def move(self, primitive: jexc.Primitive, others: Sequence[Any], params: dict[str, Any]) -> Any:
        """Rearrange the values as the function rearranges the integers."""
        if any(map(is_perturbed, others)):
            return None
        moved = primitive.bind(self.values, *others, **params)
        if primitive.multiple_results:
            return [OffGrid(part, self.path, self.observer) for part in moved]
        return OffGrid(moved, self.path, self.observer)


def perturb_integers(integers: Array, noise: Array, dtype: DTypeLike) -> Array:
    """Integers and noise, added in float32 and rounded to a floating dtype."""
    return (integers.astype(jnp.float32) + noise.astype(jnp.float32)).astype(dtype)


@register(jax.lax.convert_element_type_p)
def _convert(value: OffGrid, *, new_dtype: DTypeLike, weak_type: bool, sharding: Any) -> Array:
    if not jnp.issubdtype(new_dtype, jnp.floating):
        raise UnconvertedUse(value.path, f"a conversion to {jnp.dtype(new_dtype)}")
    if value.observer is not None:
        value.observer.convert(value.path, new_dtype)
    return value.values.astype(new_dtype)
