"""Product rules of `PerturbedArray`: the uses of a parameter that cost r (m + n) instead of m n.

    x W  ->  x W + scale (x left) right^T                for dot_general, gather (embedding) and convolution
    x W  ->  x W + scale ((x o left) shared) o right     where the members share noise; not for convolution

On a probe the same rules record which axes the function contracts (`perturbed.Use`).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from eggroll.kernels.flipout_dot.reference import flipout_product
from eggroll.kernels.lowrank_dot.reference import lowrank_product
from eggroll.lazy.kernels import noise_of, population_product
from eggroll.lazy.perturbed import PerturbedArray, UnconvertedUse, Use, register, view
from eggroll.lazy.quantised import OffGrid
from eggroll.noise import integer


def _observe(value: PerturbedArray, contracted: Sequence[int], batched: Sequence[int] = ()) -> None:
    """Record a use that contracts the probe's axes `contracted` and batches over `batched`."""

    def sources(axes):
        return frozenset(source for axis in axes for source in value.tags[axis])

    ndim, layout = value.base.ndim, value.layout
    free = sources(axis for axis in range(ndim) if axis not in {*contracted, *batched}) - layout.indexed
    dropped = frozenset(range(layout.ndim)) - sources(range(ndim))
    use = Use(sources(contracted), free, sources(batched) | dropped | layout.indexed)
    scanned = layout.tags[: len(layout.tags) - ndim]
    inserted = any(not value.tags[axis] for axis in (*contracted, *batched)) or any(not tag for tag in scanned)
    split = any(frozenset(tag) & sources(range(ndim)) for tag in scanned)
    if inserted or split or use.contracted & use.free or use.contracted & use.stacked or use.free & use.stacked:
        use = use._replace(unsupported="one of its axes is split between roles")
    value.record(use)


def _sides(value: PerturbedArray, axes: Sequence[int], where: str) -> tuple[str, str]:
    """Names of the factor that spans exactly one side containing `axes`, and of the other."""
    for name, other in (("left", "right"), ("right", "left")):
        if all(value.layout.owns(name, value.tags[a]) and not value.layout.owns(other, value.tags[a]) for a in axes):
            return name, other
    raise value.unsupported(where)


def _dot(x: Array, value: PerturbedArray, contract, batch, *, x_first: bool, params: dict) -> Array:
    """`contract` and `batch` are pairs (axes of x, axes of the parameter)."""
    if value.layout.quantised is not None:
        raise UnconvertedUse(value.layout.path, "'dot_general'")
    if x_first and _suits_kernel(x, value, contract, batch, params):
        return _kernel_product(x, value)
    operands = (x, value.base) if x_first else (value.base, x)
    out = jax.lax.dot_general_p.bind(*operands, **params)
    if value.observed:
        _check_accumulator(value, out)
        _observe(value, contract[1], batch[1])
        return out
    value = value.unpacked()
    x_axes = list(range(x.ndim))
    w_axes = list(range(x.ndim, x.ndim + value.base.ndim))
    for x_axis, w_axis in zip((*contract[0], *batch[0]), (*contract[1], *batch[1]), strict=True):
        w_axes[w_axis] = x_axis
    x_free = [a for a in x_axes if a not in {*contract[0], *batch[0]}]
    w_free = [label for label in w_axes if label >= x.ndim]
    first, second = _sides(value, contract[1], "a product over both its rows and its columns")
    labels = {name: [w_axes[a] for a in value.positions(name)] for name in (first, second, "scale")}
    options: dict[str, Any] = dict(
        first=getattr(value, first),
        second=getattr(value, second),
        scale=value.scale,
        x_axes=x_axes,
        first_axes=labels[first],
        second_axes=labels[second],
        scale_axes=labels["scale"],
        out_axes=[*batch[0], *(x_free + w_free if x_first else w_free + x_free)],
        precision=params["precision"],
        dtype=params["preferred_element_type"],
    )
    if value.shared is None:
        term = lowrank_product(x, **options)
    else:
        term = flipout_product(x, shared=value.shared, shared_axes=w_axes, **options)
    return out + _perturbation(value, term).astype(out.dtype)


def _suits_kernel(x: Array, value: PerturbedArray, contract, batch, params: dict) -> bool:
    """Whether the product is x W in the operands' own precision, of a parameter that is planned for a kernel."""
    if value.observed or value.layout.implementation == "reference" or batch[1] or value.base.ndim != 2:
        return False
    along = (tuple(contract[0]), tuple(contract[1])) == ((x.ndim - 1,), (0,))
    upright = value.layout.owns("left", value.tags[0]) and not value.layout.owns("right", value.tags[0])
    wanted = jnp.int32 if value.layout.integer else value.base.dtype
    plain = params["preferred_element_type"] == wanted or (wanted == x.dtype and params["preferred_element_type"] is None)
    default = params["precision"] in (None, (jax.lax.Precision.DEFAULT,) * 2)
    return along and upright and plain and default and x.dtype == value.base.dtype


def _kernel_product(x: Array, value: PerturbedArray) -> Array:
    rows, noise = x.reshape(-1, x.shape[-1]), noise_of(value.words, value.left, value.right)
    bits = value.layout.integer.scale[1] if value.layout.integer else None
    out = population_product(rows, value.base, noise, value.scale, rank=value.layout.rank, bits=bits)
    return out.reshape(*x.shape[:-1], value.base.shape[1])


def _perturbation(value: PerturbedArray, term: Array) -> Array:
    """A product with the factors, in the units of a product with the parameter."""
    return value.layout.integer.rounded(term) if value.layout.integer else term


def _check_accumulator(value: PerturbedArray, out: Array) -> None:
    if value.base.dtype == jnp.int8 and out.dtype != jnp.int32:
        raise ValueError(
            f"int8 parameter '{value.layout.path}' is used in a product of dtype {out.dtype}; "
            "give the product preferred_element_type=jnp.int32 and rescale its result."
        )


@register(jax.lax.dot_general_p)
def _dot_array_perturbed(x: ArrayLike, value: PerturbedArray, **params):
    (x_contract, w_contract), (x_batch, w_batch) = params["dimension_numbers"]
    return _dot(x, value, (x_contract, w_contract), (x_batch, w_batch), x_first=True, params=params)


@register(jax.lax.dot_general_p)
def _dot_perturbed_array(value: PerturbedArray, x: ArrayLike, **params):
    (w_contract, x_contract), (w_batch, x_batch) = params["dimension_numbers"]
    return _dot(x, value, (x_contract, w_contract), (x_batch, w_batch), x_first=False, params=params)


@register(jax.lax.gather_p)
def _gather(value: PerturbedArray, indices: ArrayLike, **params):
    """Look up along one axis: rows of a matrix (an embedding), or a view of stacked matrices (experts)."""
    numbers, ndim, layout = params["dimension_numbers"], value.base.ndim, value.layout
    axes = numbers.start_index_map
    whole = all(size == (1 if a in axes else value.base.shape[a]) for a, size in enumerate(params["slice_sizes"]))
    if len(axes) != 1 or numbers.collapsed_slice_dims != axes or numbers.operand_batching_dims or not whole:
        return PerturbedArray.default(jax.lax.gather_p, [value, indices], params)
    out = jax.lax.gather_p.bind(value.base, indices, **params)
    axis, kept = axes[0], [a for a in range(ndim) if a != axes[0]]
    if value.observed and len(kept) == 1:
        _observe(value, [axis])
        return out if value.layout.quantised is None else OffGrid(out.astype(jnp.float32), layout.path, layout.observer)
    kept_axes, index_axes = iter(kept), iter(range(ndim, ndim + indices.ndim - 1))
    out_axes = [next(kept_axes) if d in numbers.offset_dims else next(index_axes) for d in range(out.ndim)]
    if len(kept) == 1:
        term = _gathered_rows(value.unpacked(), indices[..., 0], axis, out_axes)
        if value.shared is not None:
            term *= jax.lax.gather_p.bind(value.shared, indices, **params)
        return _gathered_sum(value.unpacked(), out, term)
    return _gathered_stack(value, indices[..., 0], axis, out, out_axes)


def _gathered_sum(value: PerturbedArray, rows: Array, term: Array) -> Array | OffGrid:
    if value.layout.quantised is not None:
        return OffGrid(rows.astype(term.dtype) + term, value.layout.path)
    if value.layout.integer is None:
        return rows + term.astype(rows.dtype)
    total = rows.astype(jnp.int32) + _perturbation(value, term)
    return integer.saturated(total).astype(rows.dtype)


def _gathered_rows(value: PerturbedArray, chosen: Array, axis: int, out_axes: list[int]) -> Array:
    """The perturbation of the chosen rows; `out_axes` labels kept axes by position, index axes from 2 on."""
    first, second = _sides(value, [axis], "a lookup along a stacked axis of a vector")
    factors = getattr(value, first), getattr(value, second)
    wide = value.layout.quantised or (value.base.dtype if value.layout.integer is None else jnp.int32)
    rows = jnp.take(factors[0], chosen, axis=0, mode="clip").astype(wide) * value.scale.astype(wide)
    rows *= _in_range(chosen, value.base.shape[axis])[..., None].astype(rows.dtype)  # a fill value is not perturbed
    rank_label = 2 + chosen.ndim
    row_axes = [*range(2, rank_label), rank_label]
    return jnp.einsum(rows, row_axes, factors[1].astype(wide), [1 - axis, rank_label], out_axes)


def _in_range(chosen: Array, size: int) -> Array:
    return (chosen >= 0) & (chosen < size)


def _gathered_stack(value: PerturbedArray, chosen: Array, axis: int, out: Array, out_axes: list[int]) -> PerturbedArray:
    """A view of the chosen members of a stacked axis, for example one expert per token."""
    ndim = value.base.ndim

    def operation(array, component):
        own = value.positions(component)
        if component == "base":
            return out
        if axis not in own:
            raise value.unsupported("a lookup along a row or column axis that keeps two axes")
        at = own.index(axis)
        labels = [*own[:at], *range(ndim, ndim + chosen.ndim), *own[at + 1 :]]
        taken = jnp.take(array, chosen, axis=at, mode="clip")
        if component == "scale":
            inside = _in_range(chosen, value.base.shape[axis]).astype(array.dtype)
            taken *= inside.reshape((1,) * at + inside.shape + (1,) * (array.ndim - 1 - at))
        order = [labels.index(label) for label in out_axes if label in labels]
        return jnp.transpose(taken, order + list(range(len(labels), taken.ndim)))

    gathered = view(value, [value.tags[axis] if label >= ndim else value.tags[label] for label in out_axes], operation)
    indexed = value.layout.indexed.union(value.tags[axis]) if value.observed else frozenset()
    return dataclasses.replace(gathered, layout=dataclasses.replace(gathered.layout, indexed=indexed))


@register(jax.lax.conv_general_dilated_p)
def _conv(x: ArrayLike, value: PerturbedArray, **params):
    """Convolve with the factor of the patch as r filters, then mix their outputs into channels."""
    grouped = params["feature_group_count"] != 1 or params["batch_group_count"] != 1
    if grouped or jnp.issubdtype(value.base.dtype, jnp.integer):
        return PerturbedArray.default(jax.lax.conv_general_dilated_p, [x, value], params)
    channel = params["dimension_numbers"].rhs_spec[0]
    patch = [axis for axis in range(value.base.ndim) if axis != channel]
    out = jax.lax.conv_general_dilated_p.bind(x, value.base, **params)
    if value.observed:
        _observe(value, patch)
        return out
    if value.shared is not None:  # its signs change within a patch: every member would need filters of its own
        raise value.unsupported("a convolution with shared noise")
    value = value.unpacked()
    first, second = _sides(value, patch, "a convolution whose patch is not one side of its matrix")
    filters = jnp.moveaxis(getattr(value, first), -1, channel)  # the rank takes the place of the output channels
    hidden = jax.lax.conv_general_dilated_p.bind(x, filters, **params) * value.scale.astype(out.dtype)
    rank_label, channel_label, feature = out.ndim, out.ndim + 1, params["dimension_numbers"].out_spec[1]
    hidden_axes = [rank_label if a == feature else a for a in range(out.ndim)]
    out_axes = [channel_label if a == feature else a for a in range(out.ndim)]
    term = jnp.einsum(hidden, hidden_axes, getattr(value, second), [channel_label, rank_label], out_axes)
    return out + term.astype(out.dtype)
