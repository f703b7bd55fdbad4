"""`DenseArray`: a large parameter with dense noise that is not drawn yet.

    value = base + amplitude * noise        the noise at addresses, drawn where the function reads the parameter

A scan over stacked layers draws the noise of its own layer; a lookup of rows draws theirs; a product over the columns of a
matrix [rows, columns], such as an output head, draws some rows at a time. Any other operation reads the sum, which is built
once in every program, or body of a loop, that reads it. So the noise or perturbed copies of all parameters never exist at once.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.extend.core as jexc
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from eggroll.lazy.hoisting import grouped
from eggroll.lazy.lookups import axis_of_lookup, in_range, wide_indices
from eggroll.lazy.perturbed import LazyArray, is_perturbed, register
from eggroll.noise.leaves import DenseLeaf, at_least_float32
from eggroll.noise.once import computed_once
from eggroll.noise.regions import draw_values, length_of_blocks

ROWS = 1 << 20  # weights of the rows that a product reads at a time


class DenseArray(LazyArray):
    """A parameter, or a layer of it that a scan has sliced; see the module docstring."""

    base: Array  # [*lead, *rest]
    keys: Array  # uint32 [*lead, 2], of the addresses
    first: Array  # uint32 [*lead], the value at the address that the base begins with
    amplitude: Array  # float32 [*lead], sign * sigma * sigma_multiplier
    leaf: DenseLeaf = eqx.field(static=True)

    def aval(self) -> Any:
        """Abstract value of the sum."""
        return jax.typeof(self.base).update(dtype=jnp.dtype(self.leaf.noise_dtype), weak_type=False)

    def source(self) -> str:
        """The path of the parameter."""
        return self.leaf.path

    def read(self, where: str, reason: str, *, moves: bool) -> Array:
        """Return the sum."""
        return self.build()

    def build(self) -> Array:
        """Return the sum."""
        build: Callable = _build
        for _ in self.first.shape:
            build = jax.vmap(build, in_axes=(0, 0, 0, 0, None))
        return build(self.base, self.keys, self.first, self.amplitude, self.leaf)

    def rows(self, start: Array | int, count: int) -> Array:
        """Return `count` rows of a matrix from `start` on."""
        base = jax.lax.dynamic_slice_in_dim(self.base, start, count)
        first = self.first + jnp.asarray(start).astype(jnp.uint32) * jnp.uint32(self.base.shape[1])
        return _build(base, self.keys, first, self.amplitude, self.leaf)

    def sliceable(self) -> "DenseArray":
        """The same value, every layer along the leading axis with an address and a first value of its own."""
        if self.first.ndim:
            return self
        count = self.base.shape[0]
        first = self.first + jnp.arange(count, dtype=jnp.uint32) * jnp.uint32(self.base.size // max(1, count))
        keys, amplitude = (jnp.broadcast_to(x, (count, *x.shape)) for x in (self.keys, self.amplitude))
        return DenseArray(self.base, keys, first, amplitude, self.leaf)

    def is_read_by(self, primitive: jexc.Primitive, operands: Sequence[Any], place: int, params: dict[str, Any]) -> bool:
        """Whether a primitive reads the sum of the value, its operand number `place`; others draw what they need."""
        if primitive is jax.lax.scan_p:
            *whole, _ = grouped(list(range(len(operands))), **{name: params[name] for name in _GROUPING if name in params})
            return any(place in group for group in whole)
        if self.first.ndim or self.base.ndim != 2 or sum(map(is_perturbed, operands)) > 1:
            return True
        if primitive is jax.lax.gather_p:
            return (
                place != 0 or _found(self.base, params) is None or 2 * _size_of_lookup(operands[1], self.base) > self.base.size
            )
        if primitive is jax.lax.dot_general_p:
            contract, batch = (axes[place] for axes in params["dimension_numbers"])
            return tuple(contract) != (1,) or len(batch) > 0 or self.base.size < 2 * ROWS
        return True


_GROUPING = ("num_consts", "num_carry", "ft_in")


def perturb_dense(leaf: DenseLeaf, base: Array, keys: Array, amplitude: Array) -> DenseArray:
    """Wrap a parameter with noise that is not drawn yet.

    Args:
        leaf: its plan.
        base: the parameter.
        keys: uint32 [*stack, 2], of the addresses of one pair.
        amplitude: float32 [].
    """
    stack = keys.shape[:-1]
    return DenseArray(base, keys, jnp.zeros(stack, jnp.uint32), jnp.broadcast_to(amplitude, stack), leaf)


def dense_sum(base: Array, noise: Array, amplitude: Array, dtype: Any) -> Array:
    """Base + amplitude * noise, added in float32, or the base's own dtype if that is wider, and rounded to `dtype`."""
    sums = at_least_float32(base.dtype)
    return (base.astype(sums) + jnp.asarray(amplitude, sums) * noise.astype(sums)).astype(dtype)


def _build(base: Array, keys: Array, first: Array, amplitude: Array, leaf: DenseLeaf) -> Array:
    noise = draw_values(leaf, keys, first, base.size).reshape(base.shape)
    return dense_sum(base, computed_once(noise), amplitude, leaf.noise_dtype)


def _found(base: Array, params: dict[str, Any]) -> int | None:
    """The axis of the result that runs over the columns, where a gather looks up whole rows of a matrix; None: it does not."""
    numbers = params["dimension_numbers"]
    if axis_of_lookup(base.shape, **params) != 0 or tuple(numbers.collapsed_slice_dims) != (0,):
        return None
    return numbers.offset_dims[0]


def _size_of_lookup(indices: Any, base: Array) -> int:
    return math.prod(jnp.shape(indices)[:-1]) * base.shape[1]


@register(jax.lax.gather_p)
def _lookup(value: DenseArray, indices: ArrayLike, **params: Any) -> Array:
    """W[i] + amplitude noise[i]: only the noise of the rows is drawn; a fill value is not perturbed."""
    count, width = value.base.shape
    columns = _found(value.base, params)
    assert columns is not None
    chosen = wide_indices(indices)[..., params["dimension_numbers"].start_index_map.index(0)]
    row = jnp.clip(chosen, 0, count - 1).astype(jnp.uint32)[..., None]
    index = value.first + row * jnp.uint32(width) + jnp.arange(width, dtype=jnp.uint32)
    noise = jnp.moveaxis(value.leaf.values_at(value.keys, index), -1, columns)
    out = jax.lax.gather_p.bind(value.base, indices, **params)
    total = dense_sum(out, computed_once(noise), value.amplitude, value.leaf.noise_dtype)
    if params["mode"] != jax.lax.GatherScatterMode.FILL_OR_DROP:
        return total
    return jnp.where(jnp.expand_dims(in_range(chosen, count), columns), total, out.astype(total.dtype))


@register(jax.lax.dot_general_p)
def _dot_array_dense(x: ArrayLike, value: DenseArray, **params: Any) -> Array:
    x = jnp.asarray(x)
    return _by_rows(value, lambda rows: jax.lax.dot_general_p.bind(x, rows, **params), axis=x.ndim - 1)


@register(jax.lax.dot_general_p)
def _dot_dense_array(value: DenseArray, x: ArrayLike, **params: Any) -> Array:
    return _by_rows(value, lambda rows: jax.lax.dot_general_p.bind(rows, jnp.asarray(x), **params), axis=0)


def _by_rows(value: DenseArray, product: Callable[[Array], Array], *, axis: int) -> Array:
    """A product of all rows of a matrix, some rows at a time; they are along `axis` of the result."""
    count, width = value.base.shape
    size = length_of_blocks(count, max(1, ROWS // width))
    whole, rest = divmod(count, size)
    one = jax.eval_shape(lambda: product(value.rows(0, size)))
    shape = [count if place == axis else length for place, length in enumerate(one.shape)]

    def add_rows(index: Array, out: Array) -> Array:
        part = product(computed_once(value.rows(index * size, size)))
        return jax.lax.dynamic_update_slice_in_dim(out, part, index * size, axis)

    out = jax.lax.fori_loop(0, whole, add_rows, jnp.zeros(shape, one.dtype))
    if not rest:
        return out
    last = product(computed_once(value.rows(count - rest, rest)))
    return jax.lax.dynamic_update_slice_in_dim(out, last, count - rest, axis)
