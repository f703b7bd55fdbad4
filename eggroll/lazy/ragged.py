"""`ragged_dot` of a population: each run of rows is multiplied by a matrix of its own (a mixture of experts).

    out[i] = x[i] W[g(i)]        g(i) the group of row i, by the sizes of the groups

JAX batches `ragged_dot` over members only with a copy of the weights for each, and not at all where they share an operand. This
primitive is the same product of one member. Batched, it is one product with W of the rows of all members, whose groups may have
different sizes: on CPU a product over groups and columns of x, where the rows of other groups are zeros, as JAX computes one
`ragged_dot` there; elsewhere the rows are sorted by group first. The rule for lazy parameters is in `products`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jexc
import jax.numpy as jnp
from jax import Array
from jax.interpreters import batching, mlir

ragged_p = jexc.Primitive("ragged_dot")
general_p = jexc.Primitive("ragged_dot_general")  # of any other form; batched, one member after the other


def ragged_dot_general(x: Any, w: Any, sizes: Any, *, out_sharding: Any, **params: Any) -> Any:
    """JAX's primitive of this name: `ragged_p` where it is a `ragged_dot`, whose operands may be transposed, or `general_p`."""
    order = _order(jnp.ndim(sizes), **params)
    if order is None:
        return general_p.bind(x, w, sizes, **params)
    x, w = (jax.lax.transpose(operand, axes) for operand, axes in zip((x, w), order, strict=True))
    return ragged_p.bind(x, w, sizes, precision=params["precision"], preferred_element_type=params["preferred_element_type"])


def _order(sizes_ndim: int, *, ragged_dot_dimension_numbers: Any, group_offset: Any, **others: Any) -> tuple | None:
    """The permutations that make the operands [M, m] and [G, m, n]; None for a product of another form."""
    numbers = ragged_dot_dimension_numbers
    (x_contract, w_contract), (x_batch, _) = numbers.dot_dimension_numbers
    x_ragged, w_group = tuple(numbers.lhs_ragged_dimensions), tuple(numbers.rhs_group_dimensions)
    is_plain = not x_batch and len(x_contract) == len(w_group) == 1 and x_ragged == (1 - x_contract[0],)
    if not is_plain or group_offset is not None or sizes_ndim != 1:
        return None
    (free,) = {0, 1, 2} - {*w_contract, *w_group}
    return (*x_ragged, *x_contract), (*w_group, *w_contract, free)


def row_groups(sizes: Array, rows: int) -> Array:
    """The group of every row, int32 [rows]; the number of groups for rows after the last one, whose product is 0."""
    return jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(rows, dtype=sizes.dtype), side="right").astype(jnp.int32)


def _one(x: Array, w: Array, sizes: Array, **params: Any) -> Array:
    return jax.lax.ragged_dot(x, w, sizes, **params)


def _general(x: Array, w: Array, sizes: Array, **params: Any) -> Array:
    return jax.lax.ragged_dot_general(x, w, sizes, **params)


def _one_by_one(operands: Sequence[Array], axes: Sequence[int | None], **params: Any) -> tuple[Array, int]:
    moved = [operand if axis is None else jnp.moveaxis(operand, axis, 0) for operand, axis in zip(operands, axes, strict=True)]
    each = [operand for operand, axis in zip(moved, axes, strict=True) if axis is not None]

    def member(own: list[Array]) -> Array:
        left = iter(own)
        return general_p.bind(*(moved[i] if axis is None else next(left) for i, axis in enumerate(axes)), **params)

    return jax.lax.map(member, each), 0


def _batched(operands: Sequence[Array], axes: Sequence[int | None], **params: Any) -> tuple[Array, int]:
    if axes[1] is not None or not sorts_rows():
        return jax.vmap(lambda x, w, sizes: _masked(x, w, sizes, **params), in_axes=tuple(axes))(*operands), 0
    members = next(operand.shape[axis] for operand, axis in zip(operands, axes, strict=True) if axis is not None)
    x, sizes = (_with_members(operands[i], axes[i], members) for i in (0, 2))
    w, rows = operands[1], x.shape[1]
    groups = jax.vmap(lambda own: row_groups(own, rows))(sizes).reshape(-1)
    order = jnp.argsort(groups, stable=True)
    counts = jnp.bincount(groups, length=w.shape[0]).astype(sizes.dtype)
    out = ragged_p.bind(x.reshape(members * rows, -1)[order], w, counts, **params)
    out = jnp.zeros_like(out).at[order].set(out, unique_indices=True)
    return out.reshape(members, rows, w.shape[2]), 0


def sorts_rows() -> bool:
    """Whether a product costs one group for every row; on CPU it costs all of them, sorted or not (experiments/LOG.md)."""
    return jax.default_backend() != "cpu"


def _with_members(operand: Array, axis: int | None, members: int) -> Array:
    if axis is None:
        return jnp.broadcast_to(operand, (members, *operand.shape))
    return jnp.moveaxis(operand, axis, 0)


def _masked(x: Array, w: Array, sizes: Array, **params: Any) -> Array:
    """The product over groups and columns of x, where the rows of other groups are zeros."""
    own = row_groups(sizes, x.shape[0]) == jnp.arange(w.shape[0])[:, None]
    spread = jnp.where(own[:, :, None], x, jnp.zeros_like(x))  # [G, M, m]
    return jax.lax.dot_general(spread, w, (((0, 2), (0, 1)), ((), ())), **params)


def _define(primitive: jexc.Primitive, function: Callable, batched: Callable) -> None:
    """Give a primitive of three arrays its meaning."""

    def abstract(x: Any, w: Any, sizes: Any, **params: Any) -> Any:
        shapes = [jax.ShapeDtypeStruct(operand.shape, operand.dtype) for operand in (x, w, sizes)]
        out = jax.eval_shape(lambda *operands: function(*operands, **params), *shapes)
        return x.update(shape=out.shape, dtype=out.dtype, weak_type=False)

    primitive.def_impl(function)
    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=False))
    batching.primitive_batchers[primitive] = batched


_define(ragged_p, _one, _batched)
_define(general_p, _general, _one_by_one)
