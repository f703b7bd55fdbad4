"""`Scaled`: a lazy parameter times factors that are computed while the program runs: a learnt exp(s), gains of its columns.

    x (g W)         ->  g (x W)            a number
    x (W diag(g))   ->  (x W) diag(g)      along axes that the product keeps
    x (diag(g) W)   ->  (x diag(g)) W      along axes that it contracts

Members may have different factors; multiplied into W, they would give every member a copy of it. The multiplication is
deferred until a product or a lookup has made an array; views keep it pending.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jexc
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from eggroll.lazy.perturbed import LazyArray, PerturbedArray, is_perturbed, register, run_rule, shape_of
from eggroll.lazy.ragged import ragged_p
from eggroll.lazy.sums import Squared, square
from eggroll.noise.leaves import at_least_float32

_LINEAR = "dot_general conv_general_dilated transpose reshape squeeze broadcast_in_dim slice dynamic_slice split copy rev"
# Linear in one operand, so that what it is multiplied by, or consists of, may be applied to the results instead.
LINEAR = frozenset(_LINEAR.split()) | {"sharding_constraint", "reduce_sum", ragged_p.name}


class Scaled(LazyArray):
    """gain * value."""

    value: LazyArray
    gain: Array  # along each axis of the value 1 or its size; float32 or wider

    def aval(self) -> Any:
        """Abstract value of the product."""
        return self.value.aval()

    def source(self) -> str:
        """The path of the parameter."""
        return self.value.source()

    def read(self, where: str, reason: str, *, moves: bool) -> Array:
        """Return what an operation without a rule reads."""
        return _scale(self.value.read(where, reason, moves=moves), self.gain)

    def unpack(self) -> "Scaled":
        """The same value without packed signs."""
        return Scaled(self.value.unpack(), self.gain)

    def prepare_for_loops(self) -> "Scaled":
        """The same value in the form that a loop should read on every iteration."""
        return Scaled(self.value.prepare_for_loops(), self.gain)

    def sliceable(self) -> "Scaled":
        """The same value with a gain for every slice along the leading axis."""
        gain = jnp.broadcast_to(self.gain, (self.aval().shape[0], *self.gain.shape[1:]))
        return Scaled(self.value.sliceable(), gain)

    def distribute(self, primitive: jexc.Primitive, operands: Sequence[Any], place: int, params: dict[str, Any]) -> Any:
        """Scale the results for the unscaled value, or the other operand; None where the primitive is not linear."""
        inner = [*operands[:place], self.value, *operands[place + 1 :]]
        if self.gain.size == 1:
            fill = params.get("fill_value") if primitive.name == "gather" else None
            is_linear = primitive.name in LINEAR or (
                primitive.name == "gather" and (fill is None or fill == 0 or np.isnan(fill))
            )
            outputs = run_rule(primitive, inner, params) if is_linear else None
            return jax.tree.map(lambda output: times(output, self.gain), outputs, is_leaf=is_perturbed)
        if primitive.name == "dot_general":
            return self._product(primitive, inner, place, params)
        if primitive.name == "conv_general_dilated" and place == 1:
            numbers = params["dimension_numbers"]
            if self.varying != [numbers.rhs_spec[0]]:  # the output channels
                return None
            shape = [-1 if axis == numbers.out_spec[1] else 1 for axis in range(self.gain.ndim)]
            return times(run_rule(primitive, inner, params), self.gain.reshape(shape))
        move = _MOVES.get(primitive.name)
        gain = move(self, **params) if move else None
        return None if gain is None else Scaled(run_rule(primitive, inner, params), gain)

    @property
    def varying(self) -> list[int]:
        """The axes along which the gain varies."""
        return [axis for axis, size in enumerate(self.gain.shape) if size > 1]

    def _product(self, primitive: jexc.Primitive, inner: list, place: int, params: dict[str, Any]) -> Any:
        contract, batch = params["dimension_numbers"]
        ndim, num_axes = self.gain.ndim, len(shape_of(inner[1 - place]))
        if set(self.varying) & set(contract[place]) and is_perturbed(inner[1 - place]):  # which would pass the gain back
            other = inner[1 - place]
            return multiply_smaller(*((self, other) if place == 0 else (other, self)), params=params)
        if set(self.varying) <= set(contract[place]):
            gain = jnp.squeeze(self.gain, [axis for axis in range(ndim) if axis not in contract[place]])
            gain = jnp.transpose(gain, np.argsort(np.argsort(contract[place])).tolist())  # in the order of the pairs
            shape = [1] * num_axes
            for axis, size in zip(contract[1 - place], gain.shape, strict=True):
                shape[axis] = size
            gain = jnp.transpose(gain, np.argsort(contract[1 - place]).tolist()).reshape(shape)
            inner[1 - place] = times(inner[1 - place], gain)
            return run_rule(primitive, inner, params)
        if set(self.varying) & set(contract[place]):
            return None
        free = [axis for axis in range(ndim) if axis not in {*contract[place], *batch[place]}]
        kept, others = [*batch[place], *free], [1] * (num_axes - len(contract[place]) - len(batch[place]))
        sizes = [self.gain.shape[axis] for axis in kept]
        own = sizes[len(batch[place]) :]
        shape = sizes[: len(batch[place])] + (others + own if place else own + others)
        gain = jnp.transpose(self.gain, [*kept, *contract[place]]).reshape(shape)
        return times(run_rule(primitive, inner, params), gain)


def multiply_smaller(a: Any, b: Any, *, params: dict[str, Any]) -> Array:
    """The product of two lazy values: the members build the smaller one, and the larger one stays lazy."""
    reason = "multiplied with a parameter that is not smaller"
    is_first = math.prod(shape_of(a)) <= math.prod(shape_of(b))
    smaller = (a if is_first else b).read("'dot_general'", reason, moves=False)
    return run_rule(jax.lax.dot_general_p, [smaller, b] if is_first else [a, smaller], params)


def times(value: Any, gain: Array) -> Any:
    """A value, lazy or not, times a gain of its ndim, or of size 1."""
    if not is_perturbed(value):
        return _scale(value, gain)
    ndim = value.aval().ndim
    gain = gain.reshape((1,) * ndim) if gain.size == 1 else gain
    if isinstance(value, Scaled) and (1 in (gain.size, value.gain.size) or gain.shape == value.gain.shape):
        return Scaled(value.value, value.gain * gain.astype(value.gain.dtype))
    return Scaled(value, gain)


def _scale(array: Array, gain: Array) -> Array:
    """In the precision of the gain, so that its perturbation survives in short floats."""
    gain = gain.reshape(()) if gain.size == 1 else gain
    wide = max(jnp.asarray(array).dtype, gain.dtype, key=lambda dtype: dtype.itemsize)
    return (jnp.asarray(array, wide) * gain.astype(wide)).astype(jnp.asarray(array).dtype)


def _inserted(value: Scaled, *, shape: Sequence[int], broadcast_dimensions: Sequence[int], **others: Any) -> Array | None:
    if np.prod(shape) != value.value.aval().size:
        return None
    sizes = [1] * len(shape)
    for axis, target in enumerate(broadcast_dimensions):
        sizes[target] = value.gain.shape[axis]
    return value.gain.reshape(sizes)


def _sliced(
    value: Scaled, *, start_indices: Sequence[int], limit_indices: Sequence[int], strides: Sequence[int] | None
) -> Array:
    steps = strides or [1] * value.gain.ndim
    cuts = [slice(*cut) for cut in zip(start_indices, limit_indices, steps, strict=True)]
    return value.gain[tuple(cut if axis in value.varying else slice(None) for axis, cut in enumerate(cuts))]


_MOVES: dict[str, Callable[..., Array | None]] = {  # what becomes of a gain with the value
    "transpose": lambda value, permutation: jnp.transpose(value.gain, permutation),
    "rev": lambda value, dimensions: jnp.flip(value.gain, dimensions),
    "squeeze": lambda value, dimensions: jnp.squeeze(value.gain, dimensions),
    "copy": lambda value: value.gain,
    "sharding_constraint": lambda value, **params: value.gain,
    "broadcast_in_dim": _inserted,
    "slice": _sliced,
}


@register(jax.lax.mul_p)
def _product(a: LazyArray | ArrayLike, b: LazyArray | ArrayLike, **params: Any) -> Any:
    if a is b and (squared := square(a)) is not None:
        return squared
    value, factor = (b, a) if math.prod(shape_of(a)) < math.prod(shape_of(b)) else (a, b)
    return _by_factor(jax.lax.mul_p, value, factor, [a, b], params)


@register(jax.lax.div_p)
def _quotient(value: LazyArray | ArrayLike, divisor: LazyArray | ArrayLike, **params: Any) -> Any:
    return _by_factor(jax.lax.div_p, value, divisor, [value, divisor], params)


@register(jax.lax.neg_p)
def _negative(value: LazyArray, **params: Any) -> Any:
    if not _takes_gain(value):
        return LazyArray.default(jax.lax.neg_p, [value], params)
    return _by_factor(jax.lax.mul_p, value, np.asarray(-1, value.aval().dtype), [], {})


def _takes_gain(value: Any) -> bool:
    return isinstance(value, Scaled | PerturbedArray | Squared) and bool(jnp.issubdtype(value.aval().dtype, jnp.floating))


def _by_factor(primitive: Any, value: Any, factor: Any, operands: list, params: dict[str, Any]) -> Any:
    """A lazy value multiplied or divided by a number, or by an array that broadcasts; a factor that is lazy is built."""
    if not _takes_gain(value) or not _broadcasts(factor, value.aval()):
        return LazyArray.default(primitive, operands, params)
    if is_perturbed(factor):
        factor = factor.read(f"'{primitive.name}'", "used as a factor", moves=False)
    wide = at_least_float32(value.aval().dtype)
    is_constant = isinstance(value, PerturbedArray) and not isinstance(factor, jax.core.Tracer)
    factor = jnp.asarray(factor)
    gain = primitive.bind(jnp.ones(factor.shape, wide), factor.astype(wide), **params)
    # A constant is the same for all members: multiplied into the parameter at once, it costs no copies. float16 would overflow
    # in the product before its factor makes it small.
    if factor.ndim == 0 and (is_constant or (value.aval().dtype == jnp.float16 and isinstance(value, PerturbedArray))):
        return _settle(value, gain)
    return times(value, gain)


def _broadcasts(factor: Any, value: Any) -> bool:
    """Whether a factor is a number, or has an axis of size 1 for each of the value's axes that it does not vary along."""
    shape = shape_of(factor)
    if not shape:
        return True
    fits = len(shape) == value.ndim and all(size in (1, whole) for size, whole in zip(shape, value.shape, strict=True))
    return fits and math.prod(shape) < value.size and value.dtype != jnp.float16


def _settle(value: PerturbedArray, gain: Array) -> PerturbedArray:
    """Multiply base and scale by a number."""

    def operation(array: Array, component: str) -> Array:
        return array if component in ("left", "right", "shared") else _scale(array, gain)

    return value.view(value.tags, operation)


@register(jax.lax.convert_element_type_p)
def _convert(value: Scaled, *, new_dtype: Any, weak_type: bool, sharding: Any) -> Any:
    params = dict(new_dtype=new_dtype, weak_type=weak_type, sharding=sharding)
    if not jnp.issubdtype(new_dtype, jnp.floating):
        return LazyArray.default(jax.lax.convert_element_type_p, [value], params)
    inner = run_rule(jax.lax.convert_element_type_p, [value.value], params)
    return times(inner, value.gain.astype(at_least_float32(new_dtype)))
