"""Product rules of `PerturbedArray`: the uses of a parameter that cost r (m + n) instead of m n.

    x W  ->  x W + scale (x left) right^T                for dot_general, ragged_dot and convolution
    x W  ->  x W + scale ((x o left) shared) o right     where the members share noise; for dot_general

On a probe the same rules record which axes the function contracts (`uses.Use`). Lookups: `lookups`; products of two
parameters: `combined`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from eggroll.lazy.kernels import population_product
from eggroll.lazy.low_rank import Contraction, FlipoutDelta, IntegerDelta, LowRankDelta
from eggroll.lazy.perturbed import PerturbedArray, register
from eggroll.lazy.probe import Probe
from eggroll.lazy.quantised import QuantisedDelta
from eggroll.lazy.ragged import ragged_p, row_groups
from eggroll.lazy.uses import UnconvertedUse, UseError

AxisPairs = tuple[Sequence[int], Sequence[int]]  # axes of x, axes of the parameter


@register(jax.lax.dot_general_p)
def _dot_array_perturbed(x: ArrayLike, value: PerturbedArray, **params: Any) -> Array:
    (x_contract, w_contract), (x_batch, w_batch) = params["dimension_numbers"]
    return _dot(jnp.asarray(x), value, (x_contract, w_contract), (x_batch, w_batch), x_first=True, params=params)


@register(jax.lax.dot_general_p)
def _dot_perturbed_array(value: PerturbedArray, x: ArrayLike, **params: Any) -> Array:
    (w_contract, x_contract), (w_batch, x_batch) = params["dimension_numbers"]
    return _dot(jnp.asarray(x), value, (x_contract, w_contract), (x_batch, w_batch), x_first=False, params=params)


def _dot(
    x: Array, value: PerturbedArray, contract: AxisPairs, batch: AxisPairs, *, x_first: bool, params: dict[str, Any]
) -> Array:
    delta = value.delta
    if isinstance(delta, QuantisedDelta):
        raise UnconvertedUse(value.axes.path, "'dot_general'")
    if isinstance(delta, LowRankDelta) and x_first and _suits_kernel(x, value, delta, contract, batch, params):
        return _kernel_product(x, value, delta)
    operands = (x, value.base) if x_first else (value.base, x)
    out = jax.lax.dot_general_p.bind(*operands, **params)
    if isinstance(delta, Probe):
        _check_accumulator(value, out)
        delta.observe(value, contract[1], batch[1])
        return out
    assert isinstance(delta, LowRankDelta)
    x_axes = list(range(x.ndim))
    w_axes = list(range(x.ndim, x.ndim + value.base.ndim))
    for x_axis, w_axis in zip((*contract[0], *batch[0]), (*contract[1], *batch[1]), strict=True):
        w_axes[w_axis] = x_axis
    x_free = [a for a in x_axes if a not in {*contract[0], *batch[0]}]
    w_free = [label for label in w_axes if label >= x.ndim]
    where = "a product over both its rows and its columns"
    (first_name, first), (second_name, second) = delta.sides(value, contract[1], where)
    labels = Contraction(
        x=x_axes,
        parameter=w_axes,
        first=[w_axes[a] for a in value.positions(first_name)],
        second=[w_axes[a] for a in value.positions(second_name)],
        scale=[w_axes[a] for a in value.positions("scale")],
        out=[*batch[0], *(x_free + w_free if x_first else w_free + x_free)],
        precision=params["precision"],
        dtype=params["preferred_element_type"],
    )
    return out + delta.product(x, first, second, labels).astype(out.dtype)


def _suits_kernel(
    x: Array, value: PerturbedArray, delta: LowRankDelta, contract: AxisPairs, batch: AxisPairs, params: dict[str, Any]
) -> bool:
    """Whether the product is x W in the operands' own precision, of a parameter that is planned for a kernel."""
    if delta.implementation == "reference" or batch[1] or value.base.ndim != 2:
        return False
    along = (tuple(contract[0]), tuple(contract[1])) == ((x.ndim - 1,), (0,))
    upright = value.axes.owns("left", value.tags[0]) and not value.axes.owns("right", value.tags[0])
    wanted = jnp.int32 if isinstance(delta, IntegerDelta) else value.base.dtype
    plain = params["preferred_element_type"] == wanted or (wanted == x.dtype and params["preferred_element_type"] is None)
    default = params["precision"] in (None, (jax.lax.Precision.DEFAULT,) * 2)
    return along and upright and plain and default and x.dtype == value.base.dtype


def _kernel_product(x: Array, value: PerturbedArray, delta: LowRankDelta) -> Array:
    rows, noise = x.reshape(-1, x.shape[-1]), delta.factors.of_matrix()
    bits = delta.noise.scale[1] if isinstance(delta, IntegerDelta) else None
    out = population_product(rows, value.base, noise, delta.scale, rank=delta.rank, bits=bits)
    return out.reshape(*x.shape[:-1], value.base.shape[1])


def _check_accumulator(value: PerturbedArray, out: Array) -> None:
    if value.base.dtype == jnp.int8 and out.dtype != jnp.int32:
        raise UseError(
            f"int8 parameter '{value.axes.path}' is used in a product of dtype {out.dtype}; "
            "give the product preferred_element_type=jnp.int32 and rescale its result."
        )


@register(ragged_p)
def _ragged(x: ArrayLike, value: PerturbedArray, sizes: ArrayLike, **params: Any) -> Array:
    """x[i] W[g] for the group g of every row i: the row looks up the factors of its group."""
    delta, base = value.delta, value.base
    if isinstance(delta, QuantisedDelta):
        raise UnconvertedUse(value.axes.path, "'ragged_dot'")
    out = ragged_p.bind(x, base, sizes, **params)
    if isinstance(delta, Probe):
        _check_accumulator(value, out)
        delta.observe(value, [1], [0])
        return out
    if isinstance(delta, FlipoutDelta):  # every row would need a copy of the noise of its matrix
        raise value.unsupported("a ragged product with shared noise")
    assert isinstance(delta, LowRankDelta)
    (_, first), (_, second) = delta.sides(value, [1], "a ragged product over both its rows and its columns")
    if not delta.scale.ndim == 1 == first.ndim - 2 == second.ndim - 2:
        raise value.unsupported("a ragged product whose groups are not its stacked axis")
    groups = row_groups(jnp.asarray(sizes), jnp.shape(x)[0])
    first, second = (jnp.take(factor, groups, axis=0, mode="clip") for factor in (first, second))
    scale = jnp.take(delta.scale, groups, mode="clip") * (groups < base.shape[0]).astype(delta.scale.dtype)
    row, m, n = range(3)
    about = params["precision"], params["preferred_element_type"]
    labels = Contraction([row, m], [], [row, m], [row, n], [row], [row, n], *about)
    term = dataclasses.replace(delta, scale=scale).product(jnp.asarray(x), first, second, labels)
    return out + term.astype(out.dtype)


@register(jax.lax.conv_general_dilated_p)
def _conv(x: ArrayLike, value: PerturbedArray, **params: Any) -> Array:
    """Convolve with the factor of the patch as r filters, then mix their outputs into channels."""
    groups = params["feature_group_count"]
    if params["batch_group_count"] != 1 or jnp.issubdtype(value.base.dtype, jnp.integer):
        return PerturbedArray.default(jax.lax.conv_general_dilated_p, [x, value], params)
    channel = params["dimension_numbers"].rhs_spec[0]
    patch = [axis for axis in range(value.base.ndim) if axis != channel]
    out = jax.lax.conv_general_dilated_p.bind(x, value.base, **params)
    delta = value.delta
    if isinstance(delta, Probe):
        delta.observe(value, patch)
        return out
    if isinstance(delta, FlipoutDelta):  # its signs change within a patch: every member would need filters of its own
        raise value.unsupported("a convolution with shared noise")
    assert isinstance(delta, LowRankDelta)
    first, second = _patch_and_channels(value, delta, patch)
    # The rank takes the place of the output channels of a group; every group has the same filters.
    filters = jnp.moveaxis(jnp.tile(first, groups), -1, channel)
    hidden = jax.lax.conv_general_dilated_p.bind(x, filters, **params) * delta.scale.astype(out.dtype)
    feature = params["dimension_numbers"].out_spec[1]
    hidden = hidden.reshape(*hidden.shape[:feature], groups, delta.rank, *hidden.shape[feature + 1 :])
    second = second.reshape(groups, -1, delta.rank)
    group, channels, rank = out.ndim, out.ndim + 1, out.ndim + 2
    before, after = list(range(feature)), list(range(feature + 1, out.ndim))
    term = jnp.einsum(
        hidden, [*before, group, rank, *after], second, [group, channels, rank], [*before, group, channels, *after]
    )
    return out + term.reshape(out.shape).astype(out.dtype)


def _patch_and_channels(value: PerturbedArray, delta: LowRankDelta, patch: Sequence[int]) -> tuple[Array, Array]:
    """The factor of the patch, with all of its axes, and that of the output channels, with no other axis."""
    where = "a convolution whose patch is not one side of its matrix"
    (first_name, first), (second_name, second) = delta.sides(value, patch, where)
    if value.positions("scale") or any(not value.tags[axis] and value.base.shape[axis] > 1 for axis in patch):
        raise value.unsupported(where)
    own, others = value.positions(first_name), value.positions(second_name)
    first = jnp.expand_dims(first, [place for place, axis in enumerate(patch) if axis not in own])
    return first, jnp.squeeze(second, [place for place, axis in enumerate(others) if axis in patch])
