"""Lazy values made of several: products with them are made of products with their parts.

    Sum       W + U            x (W + U)   ->  x W + x U
    Joined    [W, U]           x [W, U]    ->  [x W, x U]        along an axis that the product keeps
                               [x, y] [W; U]  ->  x W + y U      along one that it contracts
    Product   A B, as large as its factors or larger, such as a merged adapter     x (A B)  ->  (x A) B

Any other use reads them: the members build the parts, and combine them.
"""

import abc
import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.extend.core as jexc
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from eggroll.lazy.perturbed import LazyArray, PerturbedArray, is_perturbed, record_build, register, run_rule, shape_of
from eggroll.lazy.scaled import LINEAR, multiply_smaller
from eggroll.lazy.sums import Squared


class Combined(LazyArray):
    """A value of several parts, of which at least one is lazy."""

    parts: tuple[Any, ...]

    def source(self) -> str:
        """The path of the first parameter."""
        return next(part.source() for part in self.parts if is_perturbed(part))

    def with_parts(self, parts: Sequence[Any], **changes: Any) -> Any:
        """The same combination of other parts, plain if they are."""
        changed = dataclasses.replace(self, parts=tuple(parts), **changes)
        return changed if any(map(is_perturbed, parts)) else changed.combine(list(parts))

    def unpack(self) -> Any:
        """The same value without packed signs."""
        return self.with_parts([part.unpack() if is_perturbed(part) else part for part in self.parts])

    def prepare_for_loops(self) -> Any:
        """The same value in the form that a loop should read on every iteration."""
        return self.with_parts([part.prepare_for_loops() if is_perturbed(part) else part for part in self.parts])

    def read(self, where: str, reason: str, *, moves: bool) -> Array:
        """Return what an operation without a rule reads."""
        return self.combine([p.read(where, reason, moves=moves) if is_perturbed(p) else jnp.asarray(p) for p in self.parts])

    def sliceable(self) -> Any:
        """The whole, which members build."""
        return self.read("'scan'", "sliced by 'scan', made of several", moves=False)

    @abc.abstractmethod
    def combine(self, parts: list[Array]) -> Array:
        """The value of plain parts."""


class Sum(Combined):
    """The sum of parts of one shape and dtype."""

    def aval(self) -> Any:
        """Abstract value of the sum."""
        return next(part.aval() for part in self.parts if is_perturbed(part))

    def combine(self, parts: list[Array]) -> Array:
        """Add the parts."""
        return functools.reduce(operator.add, parts)

    def sliceable(self) -> Any:
        """The sum of what can be sliced of the parts."""
        return _sum([part.sliceable() if is_perturbed(part) else part for part in self.parts])

    def distribute(self, primitive: jexc.Primitive, operands: Sequence[Any], place: int, params: dict[str, Any]) -> Any:
        """Add the results for the parts."""
        is_factor = primitive.name in ("mul", "neg") or (primitive.name == "div" and place == 0)
        if not (is_factor or primitive.name in LINEAR or _is_cast_to_float(primitive, params)):
            return None
        results = [run_rule(primitive, [*operands[:place], part, *operands[place + 1 :]], params) for part in self.parts]
        if not primitive.multiple_results:
            return _sum(results)
        return [_sum(outputs) for outputs in zip(*results, strict=True)]


class Joined(Combined):
    """Parts next to each other along an axis."""

    axis: int = eqx.field(static=True)

    def aval(self) -> Any:
        """Abstract value of the whole."""
        shape = list(shape_of(self.parts[0]))
        shape[self.axis] = sum(shape_of(part)[self.axis] for part in self.parts)
        return jax.core.ShapedArray(tuple(shape), next(part.aval().dtype for part in self.parts if is_perturbed(part)))

    def combine(self, parts: list[Array]) -> Array:
        """Concatenate the parts."""
        return jnp.concatenate(parts, self.axis)

    def distribute(self, primitive: jexc.Primitive, operands: Sequence[Any], place: int, params: dict[str, Any]) -> Any:
        """Join, or add, the results for the parts."""
        if primitive.name in ("convert_element_type", "copy") or _is_scaling(primitive, operands, place):
            before, after = operands[:place], operands[place + 1 :]
            return self.with_parts([run_rule(primitive, [*before, part, *after], params) for part in self.parts])
        if primitive.name == "transpose":
            axis = params["permutation"].index(self.axis)
            return self.with_parts([run_rule(primitive, [part], params) for part in self.parts], axis=axis)
        if primitive.name != "dot_general" or is_perturbed(operands[1 - place]):
            return None
        contract, batch = params["dimension_numbers"]
        shared = [*contract[place], *batch[place]]
        other = jnp.asarray(operands[1 - place])
        xs: Sequence[Array] = [other] * len(self.parts)
        if self.axis in shared:
            along = [*contract[1 - place], *batch[1 - place]][shared.index(self.axis)]
            sizes = [shape_of(part)[self.axis] for part in self.parts]
            ends = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
            xs = jnp.split(other, ends, along)
        pairs = [(part, x) if place == 0 else (x, part) for part, x in zip(self.parts, xs, strict=True)]
        results = [run_rule(primitive, pair, params) for pair in pairs]
        if self.axis in contract[place]:
            return _sum(results)
        if self.axis in batch[place]:
            return jnp.concatenate(results, list(batch[place]).index(self.axis))
        free = [axis for axis in range(self.aval().ndim) if axis not in shared]
        num_others = 0 if place == 0 else other.ndim - len(shared)
        return jnp.concatenate(results, len(batch[place]) + num_others + free.index(self.axis))


class Product(Combined):
    """A B of two matrices."""

    options: tuple[tuple[str, Any], ...] = eqx.field(static=True)  # of the product: precision, dtype

    def aval(self) -> Any:
        """Abstract value of the product."""
        a, b = self.parts
        return jax.core.ShapedArray((shape_of(a)[0], shape_of(b)[1]), a.aval().dtype)

    def combine(self, parts: list[Array]) -> Array:
        """Multiply the parts."""
        return _dot(parts[0], 1, parts[1], 0, dict(self.options))

    def read(self, where: str, reason: str, *, moves: bool) -> Array:
        """Return the product, for which members build the smaller factor."""
        a, b = self.parts
        record_build(self.source(), reason or f"used in {where}, which has no low-rank rule", self.aval().size)
        params = {"dimension_numbers": (((1,), (0,)), ((), ())), **dict(self.options)}
        if is_perturbed(a) and is_perturbed(b):
            return multiply_smaller(a, b, params=params)
        return run_rule(jax.lax.dot_general_p, [a, b], params)

    def distribute(self, primitive: jexc.Primitive, operands: Sequence[Any], place: int, params: dict[str, Any]) -> Any:
        """Multiply by one factor after the other."""
        a, b = self.parts
        if primitive.name == "transpose":
            return self.with_parts([run_rule(primitive, [part], params) for part in (b, a)])
        if _is_cast_to_float(primitive, params):
            return self.with_parts([run_rule(primitive, [part], params) for part in self.parts])
        if _is_scaling(primitive, operands, place):
            return self.with_parts([run_rule(primitive, [*operands[:place], a, *operands[place + 1 :]], params), b])
        if primitive.name != "dot_general" or is_perturbed(operands[1 - place]):
            return None
        contract, batch = params["dimension_numbers"]
        if batch[0] or len(contract[0]) != 1:
            return None
        options = {name: option for name, option in params.items() if name != "dimension_numbers"}
        (axis,), (along,) = contract[place], contract[1 - place]
        first, second = self.parts if axis == 0 else (b, a)
        hidden = _dot(operands[1 - place], along, first, axis, options)
        out = _dot(hidden.astype(jnp.asarray(operands[1 - place]).dtype), hidden.ndim - 1, second, axis, options)
        return jnp.moveaxis(out, -1, 0) if place == 0 else out


def _is_cast_to_float(primitive: jexc.Primitive, params: dict[str, Any]) -> bool:
    """Whether a primitive converts to floats, which is linear up to rounding; to integers it is not."""
    return primitive.name == "convert_element_type" and bool(jnp.issubdtype(params["new_dtype"], jnp.floating))


def _is_scaling(primitive: jexc.Primitive, operands: Sequence[Any], place: int) -> bool:
    """Whether a value, `operands[place]`, is multiplied or divided by a number, or negated."""
    is_factor = primitive.name in ("mul", "neg") or (primitive.name == "div" and place == 0)
    return is_factor and not any(shape_of(other) for other in (*operands[:place], *operands[place + 1 :]))


def _dot(x: Any, along: int, y: Any, axis: int, options: dict[str, Any]) -> Any:
    return run_rule(jax.lax.dot_general_p, [x, y], {"dimension_numbers": (((along,), (axis,)), ((), ())), **options})


def _sum(parts: Sequence[Any]) -> Any:
    """Add values, lazy or not."""
    flat = [own for part in parts for own in (part.parts if isinstance(part, Sum) else (part,))]
    return Sum(tuple(flat)) if any(map(is_perturbed, flat)) else functools.reduce(operator.add, flat)


def _joined(parts: Sequence[Any], axis: int) -> Any:
    """Values next to each other, lazy or not."""
    return Joined(tuple(parts), axis) if any(map(is_perturbed, parts)) else jnp.concatenate(parts, axis)


def _is_known(value: Any) -> bool:
    """Whether a value is lazy, or a constant: a weight, that is, and no activation."""
    return is_perturbed(value) or not isinstance(value, jax.core.Tracer)


def _is_floating(*values: Any) -> bool:
    return all(jnp.issubdtype(value.aval().dtype, jnp.floating) for value in values if is_perturbed(value))


@register(jax.lax.add_p)
def _add(a: LazyArray | ArrayLike, b: LazyArray | ArrayLike, **params: Any) -> Any:
    return _added(jax.lax.add_p, a, b, params)


@register(jax.lax.sub_p)
def _subtract(a: LazyArray | ArrayLike, b: LazyArray | ArrayLike, **params: Any) -> Any:
    return _added(jax.lax.sub_p, a, b, params)


def _added(primitive: Any, a: Any, b: Any, params: dict[str, Any]) -> Any:
    """The sum, or difference, of weights; an activation is added to what the members build.

    Squares wait for their sum, and a product of parameters for its own: what is added to it may be a parameter without noise.
    """
    value, other = (a, b) if is_perturbed(a) else (b, a)
    is_product = isinstance(value, Product) and shape_of(other) == shape_of(value)
    is_lazy = is_product or all(_is_known(own) or isinstance(value, Squared) for own in (a, b))
    is_sum_of_its_shape = shape_of(other) == shape_of(value) or not (shape_of(other) or is_perturbed(other))
    if not (is_lazy and _is_floating(a, b) and is_sum_of_its_shape):
        return LazyArray.default(primitive, [a, b], params)
    if primitive is jax.lax.sub_p:
        b = run_rule(jax.lax.neg_p, [b], {}) if is_perturbed(b) else -jnp.asarray(b)
    value, other = (a, b) if is_perturbed(a) else (b, a)
    if is_perturbed(other):
        return _sum([value, other])
    if isinstance(value, PerturbedArray):
        return value.view(value.tags, lambda array, component: array + other if component == "base" else array)
    return _sum([value, jnp.broadcast_to(other, shape_of(value))])


@register(jax.lax.concatenate_p)
def _concatenate(*parts: LazyArray | ArrayLike, dimension: int) -> Any:
    if not (all(map(_is_known, parts)) and _is_floating(*parts)):
        return LazyArray.default(jax.lax.concatenate_p, parts, {"dimension": dimension})
    return _joined(parts, dimension)


@register(jax.lax.stack_p)
def _stack(*parts: LazyArray | ArrayLike, axis: int) -> Any:
    if not (all(map(_is_known, parts)) and _is_floating(*parts)):
        return LazyArray.default(jax.lax.stack_p, parts, {"axis": axis})
    shape = list(shape_of(parts[0]))
    shape.insert(axis, 1)
    kept = tuple(a for a in range(len(shape)) if a != axis)
    params = {"shape": tuple(shape), "broadcast_dimensions": kept, "sharding": None}
    return _joined([run_rule(jax.lax.broadcast_in_dim_p, [part], params) for part in parts], axis)


@register(jax.lax.dot_general_p)
def _meet(a: PerturbedArray, b: PerturbedArray, **params: Any) -> Any:
    """Two parameters: a product that is as large as they are stays a product of two."""
    (contract_a, contract_b), batch = params["dimension_numbers"]
    is_plain = params["preferred_element_type"] in (None, a.base.dtype) and a.base.dtype == b.base.dtype
    if a.base.ndim == b.base.ndim == 2 and len(contract_a) == 1 and not batch[0] and _is_floating(a, b) and is_plain:
        m, n = a.base.shape[1 - contract_a[0]], b.base.shape[1 - contract_b[0]]
        if m * n >= max(a.base.size, b.base.size):
            flip = {"permutation": (1, 0)}
            first = a if contract_a[0] == 1 else run_rule(jax.lax.transpose_p, [a], flip)
            second = b if contract_b[0] == 0 else run_rule(jax.lax.transpose_p, [b], flip)
            options = tuple((name, option) for name, option in params.items() if name != "dimension_numbers")
            return Product((first, second), options)
    return multiply_smaller(a, b, params=params)
