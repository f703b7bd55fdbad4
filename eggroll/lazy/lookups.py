"""Lookup rules of `PerturbedArray`: `gather`, and `scatter` of new rows.

    rows of a matrix (an embedding)      W[i]  ->  W[i] + scale left[i] right^T, an array
    entries, or rows of many matrices    W[i, j]  ->  W[i, j] + sum scale left[i] right[j], an array
    along one axis of several (experts)  a view: base and factors are looked up alike
    new rows (an index without meaning)  a view: the factor of the old rows is zero

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
from eggroll.lazy.perturbed import PerturbedArray, interpret_with_rules, is_perturbed, register
from eggroll.lazy.probe import Probe
from eggroll.lazy.quantised import OffGrid, QuantisedDelta
from eggroll.noise import integer
from eggroll.noise.leaves import at_least_float32


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
    axis = axis_of_lookup(value.base.shape, **params)
    if axis is None:
        return _entries(value, wide_indices(indices), params)
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
    inside = in_range(chosen, value.base.shape[axis]) if params["mode"] == GatherScatterMode.FILL_OR_DROP else None
    lookup = Lookup(axis, chosen, inside, out_axes)
    found: Any = _rows(value, lookup, out, gather) if value.base.ndim == 2 else _stacked(value, lookup, out)
    return found if kept_size is None else interpret_with_rules(functools.partial(jnp.expand_dims, axis=kept_size))(found)


def axis_of_lookup(
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


def wide_indices(indices: ArrayLike) -> Array:
    """Indices that can be compared with the size of an axis, which a narrow integer may not hold."""
    indices = jnp.asarray(indices)
    return indices.astype(jnp.int32) if indices.dtype.itemsize < 4 else indices


def in_range(chosen: Array, size: int) -> Array:
    """Whether indices are of an axis of a size, bool."""
    chosen = wide_indices(chosen)
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
    """A view of the chosen entries of an axis, for example one expert per token."""
    ndim, axis, chosen = value.base.ndim, lookup.axis, lookup.chosen
    masked = next((name for name in ("scale", "left", "right") if value.axes.owns(name, value.tags[axis])), None)

    def operation(array: Array, component: str) -> Array:
        own = value.positions(component)
        if component == "base":
            return out
        if axis not in own:
            return array
        at = own.index(axis)
        labels = [*own[:at], *range(ndim, ndim + chosen.ndim), *own[at + 1 :]]
        taken = jnp.take(array, chosen, axis=at, mode="clip")
        taken = lookup.mask(taken, at) if component == masked else taken
        order = [labels.index(label) for label in lookup.out_axes if label in labels]
        return jnp.transpose(taken, order + list(range(len(labels), taken.ndim)))

    tags = [value.tags[axis] if label >= ndim else value.tags[label] for label in lookup.out_axes]
    gathered = value.view(tags, operation)
    return gathered.with_delta(gathered.delta.mark_indexed(value.tags[axis]))


def _entries(value: PerturbedArray, indices: Array, params: dict[str, Any]) -> Any:
    """Single entries along several axes, all others being whole, from base and factors: an array of what was looked up."""
    numbers, shape, delta = params["dimension_numbers"], value.base.shape, value.delta
    batching, starts = tuple(numbers.operand_batching_dims), tuple(numbers.start_index_map)
    single = sorted((*numbers.collapsed_slice_dims, *batching))
    kept = [axis for axis in range(len(shape)) if axis not in single]
    is_whole = all(params["slice_sizes"][axis] == shape[axis] for axis in kept) and {*starts} == {*single} - {*batching}
    if (
        not is_whole
        or not starts
        or params["mode"] == GatherScatterMode.ONE_HOT
        or isinstance(delta, QuantisedDelta | IntegerDelta)
    ):
        return PerturbedArray.default(jax.lax.gather_p, [value, indices], params)
    out = jax.lax.gather_p.bind(value.base, indices, **params)
    if isinstance(delta, Probe):
        delta.observe(value, starts if kept or batching else starts[:1], batching if kept else ())
        return out
    assert isinstance(delta, LowRankDelta)
    chosen = {axis: indices[..., place] for place, axis in enumerate(starts)}
    for axis, along in zip(batching, numbers.start_indices_batching_dims, strict=True):
        chosen[axis] = jax.lax.broadcasted_iota(indices.dtype, indices.shape[:-1], along)
    rank_label, num_chosen = len(shape) + out.ndim, indices.ndim - 1
    of_kept, of_chosen = iter(num_chosen + axis for axis in kept), iter(range(num_chosen))
    out_axes = [next(of_kept) if axis in numbers.offset_dims else next(of_chosen) for axis in range(out.ndim)]

    def looked_up(array: Array, component: str) -> tuple[Array, list[int]]:
        own = value.positions(component)
        first, rest = [axis for axis in own if axis in single], [axis for axis in own if axis in kept]
        moved = jnp.transpose(array, [own.index(axis) for axis in (*first, *rest)] + list(range(len(own), array.ndim)))
        labels = [*(range(num_chosen) if first else ()), *(num_chosen + axis for axis in rest)]
        labels += [rank_label] * (array.ndim - len(own))
        wide = at_least_float32(value.base.dtype)
        taken = moved[tuple(jnp.clip(chosen[axis], 0, shape[axis] - 1) for axis in first)] if first else moved
        return taken.astype(wide), labels

    factors = delta.arrange(value)
    terms = looked_up(factors.left, "left"), looked_up(factors.right, "right"), looked_up(delta.scale, "scale")
    term = jnp.einsum(*(part for term in terms for part in term), out_axes)
    if isinstance(delta, FlipoutDelta):
        term *= jax.lax.gather_p.bind(delta.shared, indices, **params | {"fill_value": 0})
    if params["mode"] == GatherScatterMode.FILL_OR_DROP:
        inside = functools.reduce(jnp.logical_and, [in_range(chosen[axis], shape[axis]) for axis in starts])
        sizes = [1 if axis in numbers.offset_dims else size for axis, size in enumerate(out.shape)]
        term *= inside.reshape(sizes).astype(term.dtype)
    return out + term.astype(out.dtype)


@register(jax.lax.scatter_p)
def _replace(value: PerturbedArray, indices: ArrayLike, updates: ArrayLike, **params: Any) -> Any:
    """Whole entries of one axis are replaced, for example the row of a padding token by zeros."""
    numbers, axes = params["dimension_numbers"], value.axes
    (axis, *more), operands = numbers.scatter_dims_to_operand_dims, [value, indices, updates]
    whole = [size for other, size in enumerate(value.base.shape) if other != axis]
    window = [jnp.shape(updates)[dim] for dim in numbers.update_window_dims]
    names = [name for name in ("scale", "left", "right") if axes.owns(name, value.tags[axis])]
    is_plain = not any(map(is_perturbed, operands[1:])) and not numbers.operand_batching_dims
    if more or not is_plain or tuple(numbers.inserted_window_dims) != (axis,) or window != whole or not names:
        return PerturbedArray.default(jax.lax.scatter_p, operands, params)
    if isinstance(value.delta, QuantisedDelta):
        return PerturbedArray.default(jax.lax.scatter_p, operands, params)
    rows, dropped = wide_indices(indices)[..., 0], params["mode"] == GatherScatterMode.FILL_OR_DROP

    def operation(array: Array, component: str) -> Array:
        if component == "base":
            return jax.lax.scatter_p.bind(array, *operands[1:], **params)
        if component != names[0]:
            return array
        at = (slice(None),) * value.positions(component).index(axis)
        places = jnp.where(in_range(rows, value.base.shape[axis]), rows, value.base.shape[axis]) if dropped else rows
        return array.at[(*at, jnp.clip(places, 0))].set(0, mode="drop" if dropped else "clip")

    return value.view(value.tags, operation)
