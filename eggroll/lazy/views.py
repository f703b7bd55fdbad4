"""View rules of `PerturbedArray`: transpose, cast, reshape, slice, pad, reverse and the like act on base and factors alike.

A view that would mix rows, columns and stacked axes has no rule; the plan then gives the parameter dense noise.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from eggroll.lazy.perturbed import LazyArray, PerturbedArray, Tag, is_perturbed, register
from eggroll.lazy.quantised import QuantisedDelta


@register(jax.lax.transpose_p)
def _transpose(value: PerturbedArray, *, permutation: Sequence[int]) -> PerturbedArray:
    def operation(array: Array, component: str) -> Array:
        own = value.positions(component)
        order = [own.index(axis) for axis in permutation if axis in own]
        return jnp.transpose(array, order + list(range(len(own), array.ndim)))

    return value.view([value.tags[axis] for axis in permutation], operation)


@register(jax.lax.convert_element_type_p)
def _convert_element_type(value: PerturbedArray, *, new_dtype: DTypeLike, weak_type: bool, sharding: Any) -> Any:
    if isinstance(value.delta, QuantisedDelta):
        return value.delta.convert(value, new_dtype)
    kinds = jnp.floating, jnp.integer
    if not any(jnp.issubdtype(new_dtype, kind) and jnp.issubdtype(value.base.dtype, kind) for kind in kinds):
        params = dict(new_dtype=new_dtype, weak_type=weak_type, sharding=sharding)
        return PerturbedArray.default(jax.lax.convert_element_type_p, [value], params)
    return value.view(value.tags, lambda array, component: array.astype(new_dtype))


@register(jax.lax.copy_p)
def _copy(value: PerturbedArray) -> PerturbedArray:
    return value


@register(jax.lax.optimization_barrier_p)
def _barrier(*operands: LazyArray | ArrayLike) -> list:
    """Nothing holds back what is multiplied later."""
    return [value if is_perturbed(value) else jax.lax.optimization_barrier_p.bind(value)[0] for value in operands]


@register(jax.lax.device_put_p)
def _device_put(*operands: LazyArray | ArrayLike, **params: Any) -> list:
    """A parameter is where the program is."""

    def put(place: int, value: Any) -> Any:
        if is_perturbed(value):
            return value
        own = {
            name: option[place : place + 1] if isinstance(option, list | tuple) else option for name, option in params.items()
        }
        return jax.lax.device_put_p.bind(value, **own)[0]

    return [put(place, value) for place, value in enumerate(operands)]


@register(jax.lax.sharding_constraint_p)
def _constrain(value: PerturbedArray, **params: Any) -> PerturbedArray:
    def operation(array: Array, component: str) -> Array:
        return jax.lax.sharding_constraint_p.bind(array, **params) if component == "base" else array

    return value.view(value.tags, operation)


@register(jax.lax.tile_p)
def _tile(value: PerturbedArray, *, reps: Sequence[int]) -> PerturbedArray:
    def operation(array: Array, component: str) -> Array:
        own = value.positions(component)
        return jnp.tile(array, [*(reps[axis] for axis in own), *[1] * (array.ndim - len(own))])

    return value.view(value.tags, operation)


def _places(value: PerturbedArray, component: str, axes: Sequence[int]) -> list[int]:
    """Where a component has those of the axes of a value that it has."""
    own = value.positions(component)
    return [own.index(axis) for axis in axes if axis in own]


@register(jax.lax.rev_p)
def _reverse(value: PerturbedArray, *, dimensions: Sequence[int]) -> PerturbedArray:
    def operation(array: Array, component: str) -> Array:
        return jnp.flip(array, _places(value, component, dimensions))

    return value.view(value.tags, operation)


@register(jax.lax.pad_p)
def _pad(value: PerturbedArray, filling: ArrayLike, *, padding_config: Sequence[tuple[int, int, int]]) -> PerturbedArray:
    """What is added has no perturbation."""

    def operation(array: Array, component: str) -> Array:
        own = [padding_config[axis] for axis in value.positions(component)]
        padding = jnp.asarray(filling, array.dtype) if component == "base" else jnp.zeros((), array.dtype)
        return jax.lax.pad(array, padding, own + [(0, 0, 0)] * (array.ndim - len(own)))

    return value.view(value.tags, operation)


@register(jax.lax.squeeze_p)
def _squeeze(value: PerturbedArray, *, dimensions: Sequence[int]) -> PerturbedArray:
    def operation(array: Array, component: str) -> Array:
        return jnp.squeeze(array, _places(value, component, dimensions))

    return value.view([tag for axis, tag in enumerate(value.tags) if axis not in dimensions], operation)


@register(jax.lax.split_p)
def _split(value: PerturbedArray, *, sizes: Sequence[int], axis: int) -> list[PerturbedArray]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    parts = []
    for start, size in zip(starts, sizes, strict=True):
        limits = list(value.base.shape)
        begin = [0] * len(limits)
        begin[axis], limits[axis] = start, start + size
        parts.append(_slice(value, start_indices=tuple(begin), limit_indices=tuple(limits), strides=None))
    return parts


@register(jax.lax.unstack_p)
def _unstack(value: PerturbedArray, *, axis: int) -> list[PerturbedArray]:
    size = value.base.shape[axis]
    return [_squeeze(part, dimensions=(axis,)) for part in _split(value, sizes=[1] * size, axis=axis)]


@register(jax.lax.slice_p)
def _slice(
    value: PerturbedArray, *, start_indices: Sequence[int], limit_indices: Sequence[int], strides: Sequence[int] | None
) -> PerturbedArray:
    steps = [1] * value.base.ndim if strides is None else strides

    def operation(array: Array, component: str) -> Array:
        own = value.positions(component)
        return array[tuple(slice(start_indices[a], limit_indices[a], steps[a]) for a in own)]

    return value.view(value.tags, operation)


@register(jax.lax.dynamic_slice_p)
def _dynamic_slice(value: PerturbedArray, *starts: ArrayLike, slice_sizes: Sequence[int]) -> PerturbedArray:
    def operation(array: Array, component: str) -> Array:
        own = value.positions(component)
        rest = array.shape[len(own) :]
        sizes = (*(slice_sizes[a] for a in own), *rest)
        # Not `jax.lax.dynamic_slice`, which would add the axis's size to negative starts a second time.
        return jax.lax.dynamic_slice_p.bind(
            array, *(starts[a] for a in own), *[jnp.zeros_like(starts[0])] * len(rest), slice_sizes=sizes
        )

    return value.view(value.tags, operation)


@register(jax.lax.reshape_p)
def _reshape(value: PerturbedArray, *, new_sizes: Sequence[int], dimensions: Sequence[int] | None, sharding: Any) -> Any:
    tags = _reshaped_tags(value, new_sizes) if dimensions is None else None
    if tags is None:
        params = dict(new_sizes=new_sizes, dimensions=dimensions, sharding=sharding)
        return PerturbedArray.default(jax.lax.reshape_p, [value], params)
    return _resized(value, tags, new_sizes)


@register(jax.lax.broadcast_in_dim_p)
def _broadcast_in_dim(
    value: PerturbedArray, *, shape: Sequence[int], broadcast_dimensions: Sequence[int], sharding: Any
) -> Any:
    if math.prod(shape) != value.base.size:
        params = dict(shape=shape, broadcast_dimensions=broadcast_dimensions, sharding=sharding)
        return PerturbedArray.default(jax.lax.broadcast_in_dim_p, [value], params)
    tags: list[Tag] = [()] * len(shape)
    for axis, target in enumerate(broadcast_dimensions):
        tags[target] = value.tags[axis]
    return _resized(value, tags, shape)


def _resized(value: PerturbedArray, tags: Sequence[Tag], sizes: Sequence[int]) -> PerturbedArray:
    def operation(array: Array, component: str) -> Array:
        own = value.positions(component)
        new = [sizes[axis] for axis in value.positions(component, tags)]
        return array.reshape(*new, *array.shape[len(own) :])

    return value.view(tags, operation)


def _reshaped_tags(value: PerturbedArray, new_sizes: Sequence[int]) -> list[Tag] | None:
    """Tags after a reshape, or None where it would mix row, column and stacked axes."""
    old = value.base.shape
    tags: list[Tag] = [()] * len(new_sizes)
    for sources, targets in _reshape_groups(old, new_sizes):
        merged = tuple(sorted({source for axis in sources for source in value.tags[axis]}))
        if value.delta.observer is None and len({_owner(value, (source,)) for source in merged}) > 1:
            return None
        for axis in targets:
            tags[axis] = merged
    return tags


def _owner(value: PerturbedArray, tag: Tag) -> tuple[bool, bool]:
    return value.axes.owns("left", tag), value.axes.owns("right", tag)


def _reshape_groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of old and new axes with equal products; axes of size 1 belong to no run."""
    old_axes = [axis for axis, size in enumerate(old) if size != 1]
    new_axes = [axis for axis, size in enumerate(new) if size != 1]
    groups = []
    while old_axes and new_axes:
        sources, targets = [old_axes.pop(0)], [new_axes.pop(0)]
        while (left := math.prod(old[a] for a in sources)) != (right := math.prod(new[a] for a in targets)):
            if left < right:
                sources.append(old_axes.pop(0))
            else:
                targets.append(new_axes.pop(0))
        groups.append((sources, targets))
    return groups
