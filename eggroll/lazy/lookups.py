"""Lookup rules of `PerturbedArray`: `gather` along one axis.

    rows of a matrix (an embedding)      W[i]  ->  W[i] + scale left[i] right^T, an array
    members of a stacked axis (experts)  a view: base and factors are looked up alike

An index beyond an axis means what it means to the base: it is clipped to the last or first entry, whose perturbation it gets,
or it reads the fill value, which is not perturbed. On a probe the same rule records the use.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import GatherScatterMode
from jax.typing import ArrayLike

from eggroll.lazy.low_rank import FlipoutDelta, IntegerDelta, LowRankDelta
from eggroll.lazy.perturbed import PerturbedArray, interpret_with_rules, register
from eggroll.lazy.probe import Probe
from eggroll.lazy.quantised import OffGrid, QuantisedDelta
from eggroll.noise import integer


class Lookup(NamedTuple):
    """Single entries of one axis, all others being whole; the axis itself is dropped."""

    axis: int
    chosen: Array  # integers of any shape
    inside: Array | None  # bool like `chosen`; None where an index beyond the axis is clipped
    out_axes: list[int]  # of the result: a kept axis's position in the base, or its ndim + an axis of `chosen`

    def mask(self, array: Array, first: int) -> Array:
        """Zero of `array` where nothing was looked up; the axes of `chosen` start at `first`."""
        if self.inside is None:
            return array
        shape = (1,) * first + self.inside.shape
        return array * self.inside.astype(array.dtype).reshape(*shape, *(1,) * (array.ndim - len(shape)))


@register(jax.lax.gather_p)
def _gather(value: PerturbedArray, indices: ArrayLike, **params: Any) -> Any:
    axis = _axis_of_lookup(value.base.shape, **params)
    if axis is None:
        return PerturbedArray.default(jax.lax.gather_p, [value, indices], params)
    numbers = params["dimension_numbers"]
    kept_size = None if numbers.collapsed_slice_dims else numbers.offset_dims[axis]  # where the axis stays, of size 1

    def gather(array: Array, fill_value: Any) -> Array:
        out = jax.lax.gather_p.bind(array, indices, **params | {"fill_value": fill_value})
        return out if kept_size is None else jnp.squeeze(out, kept_size)

    out = gather(value.base, params["fill_value"])
    chosen = jnp.asarray(indices)[..., numbers.start_index_map.index(axis)]
    offsets = [d - (kept_size is not None and d > kept_size) for d in numbers.offset_dims if d != kept_size]
    kept, looked_up = (a for a in range(value.base.ndim) if a != axis), iter(range(chosen.ndim))
    out_axes = [next(kept) if d in offsets else value.base.ndim + next(looked_up) for d in range(out.ndim)]
    inside = _in_range(chosen, value.base.shape[axis]) if params["mode"] == GatherScatterMode.FILL_OR_DROP else None
    lookup = Lookup(axis, chosen, inside, out_axes)
    found: Any = _rows(value, lookup, out, gather) if value.base.ndim == 2 else _stacked(value, lookup, out)
    return found if kept_size is None else interpret_with_rules(functools.partial(jnp.expand_dims, axis=kept_size))(found)


def _axis_of_lookup(
    shape: Sequence[int], *, dimension_numbers: Any, slice_sizes: Sequence[int], mode: Any, **others: Any
) -> int | None:
    """The axis of which a gather reads single entries, all others being whole; None for any other gather."""
    indexed, collapsed = dimension_numbers.start_index_map, dimension_numbers.collapsed_slice_dims
    partial = [a for a, size in enumerate(slice_sizes) if size != shape[a]] or [*collapsed, *indexed][:1]
    if len(partial) != 1 or dimension_numbers.operand_batching_dims or mode == GatherScatterMode.ONE_HOT:
        return None
    (axis,) = partial
    single = axis in indexed and slice_sizes[axis] == 1 and collapsed in ((), (axis,))
    # The index into an axis that is read whole can only be 0, unless out of range means that nothing is read.
    return axis if single and (len(indexed) == 1 or mode != GatherScatterMode.FILL_OR_DROP) else None


def _in_range(chosen: Array, size: int) -> Array:
    chosen = chosen.astype(jnp.int32) if chosen.dtype.itemsize < 4 else chosen  # which `size` may not fit
    return (chosen >= 0) & (chosen < size)


def _rows(value: PerturbedArray, lookup: Lookup, out: Array, gather: Callable) -> Array | OffGrid:
    """Rows of a matrix; `out` is those of the base, `gather(array, fill_value)` looks up another array."""
    is_quantised = isinstance(value.delta, QuantisedDelta)
    delta = value.delta.converted if isinstance(value.delta, QuantisedDelta) else value.delta
    if isinstance(delta, Probe):
        delta.observe(value, [lookup.axis])
        return OffGrid(out.astype(jnp.float32), value.axes.path, delta.observer) if is_quantised else out
    assert isinstance(delta, LowRankDelta)
    wide = jnp.int32 if isinstance(delta, IntegerDelta) else value.base.dtype
    term = _perturbed_rows(value, delta, lookup, value.delta.dtype if isinstance(value.delta, QuantisedDelta) else wide)
    if isinstance(delta, FlipoutDelta):
        term *= gather(delta.shared, 0)
    if is_quantised:
        return OffGrid(out.astype(term.dtype) + term, value.axes.path)
    if isinstance(delta, IntegerDelta):
        return integer.saturate(out.astype(jnp.int32) + delta.noise.rescale(term)).astype(out.dtype)
    return out + term.astype(out.dtype)


def _perturbed_rows(value: PerturbedArray, delta: LowRankDelta, lookup: Lookup, wide: Any) -> Array:
    """The delta of the chosen rows, in the dtype `wide`."""
    (_, first), (_, second) = delta.sides(value, [lookup.axis], "a lookup along a stacked axis of a vector")
    rows = jnp.take(first, lookup.chosen, axis=0, mode="clip").astype(wide) * delta.scale.astype(wide)
    rank_label = 2 + lookup.chosen.ndim
    labels = [*range(2, rank_label), rank_label]
    return jnp.einsum(lookup.mask(rows, 0), labels, second.astype(wide), [1 - lookup.axis, rank_label], lookup.out_axes)


def _stacked(value: PerturbedArray, lookup: Lookup, out: Array) -> PerturbedArray:
    """A view of the chosen members of a stacked axis, for example one expert per token."""
    ndim, axis, chosen = value.base.ndim, lookup.axis, lookup.chosen

    def operation(array: Array, component: str) -> Array:
        own = value.positions(component)
        if component == "base":
            return out
        if axis not in own:
            raise value.unsupported("a lookup along a row or column axis that keeps two axes")
        at = own.index(axis)
        labels = [*own[:at], *range(ndim, ndim + chosen.ndim), *own[at + 1 :]]
        taken = jnp.take(array, chosen, axis=at, mode="clip")
        taken = lookup.mask(taken, at) if component == "scale" else taken
        order = [labels.index(label) for label in lookup.out_axes if label in labels]
        return jnp.transpose(taken, order + list(range(len(labels), taken.ndim)))

    tags = [value.tags[axis] if label >= ndim else value.tags[label] for label in lookup.out_axes]
    gathered = value.view(tags, operation)
    return gathered.with_delta(gathered.delta.mark_indexed(value.tags[axis]))
