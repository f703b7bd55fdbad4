"""Quantised parameters: int8 to the function, perturbed between the integers.

    W = s Q           the function computes (x @ Q.astype(x.dtype)) * s, a member sees float(Q) + sigma E in place of Q

A matrix whose noise is factors stays a `PerturbedArray` of base Q; the conversion is a view that gives base and factors the
floating dtype, and the products that follow are those of any lazy parameter. Where there are no factors to keep (dense noise,
rows that were looked up before the conversion), the perturbed values stand ready: `OffGrid`. Both may be moved about as int8
arrays, but not computed with: an integer has no place for a perturbation that is finer than one.
"""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.extend.core as jexc
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from eggroll.lazy.perturbed import MOVES, LazyArray, Observer, PerturbedArray, UnconvertedUse, register, view


class OffGrid(LazyArray):
    """What the function takes for an int8 array, its values lying between the integers."""

    values: Array  # floating
    path: str = eqx.field(static=True)
    observer: Observer | None = eqx.field(static=True, default=None)

    def aval(self) -> Any:
        """Abstract value: int8."""
        return jax.typeof(self.values).update(dtype=jnp.dtype(jnp.int8), weak_type=False)

    def materialise(self) -> Array:
        """Refuse: the function asked for integers."""
        raise UnconvertedUse(self.path, "an operation that needs the whole array")

    def unpacked(self) -> "OffGrid":
        """The same: nothing is packed."""
        return self

    ready_for_loops = unpacked

    @staticmethod
    def default(primitive: jexc.Primitive, values: Sequence[Any], params: dict[str, Any]) -> Any:
        """Move the values about as the function does with the integers; refuse to compute with them."""
        first = next(value for value in values if isinstance(value, OffGrid))
        if primitive.name not in MOVES or first is not values[0]:
            raise UnconvertedUse(first.path, f"'{primitive.name}'")
        moved = primitive.bind(first.values, *values[1:], **params)
        if primitive.multiple_results:
            return [OffGrid(part, first.path, first.observer) for part in moved]
        return OffGrid(moved, first.path, first.observer)


def off_grid(integers: Array, noise: Array, dtype: DTypeLike) -> Array:
    """Integers and noise, added in float32 and rounded to a floating dtype."""
    return (integers.astype(jnp.float32) + noise.astype(jnp.float32)).astype(dtype)


@register(jax.lax.convert_element_type_p)
def _convert(value: OffGrid, *, new_dtype, weak_type, sharding):
    if not jnp.issubdtype(new_dtype, jnp.floating):
        raise UnconvertedUse(value.path, f"a conversion to {jnp.dtype(new_dtype)}")
    if value.observer is not None:
        value.observer.convert(value.path, new_dtype)
    return value.values.astype(new_dtype)


def converted(value: PerturbedArray, dtype: DTypeLike) -> PerturbedArray:
    """The conversion of a quantised matrix to a floating dtype: a view, whose noise has the dtype too."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise UnconvertedUse(value.layout.path, f"a conversion to {jnp.dtype(dtype)}")
    if value.layout.observer is not None:
        value.layout.observer.convert(value.layout.path, dtype)
    floating = view(value, value.tags, lambda array, component: array if component == "scale" else array.astype(dtype))
    return floating.with_layout(quantised=None)
