"""`Scaled`: a lazy parameter times a scalar that is computed while the program runs, such as a learnt exp(s).

    x (g W)  ->  g (x W)

Members may have different scalars; multiplied into W, they would give every member a copy of it. The multiplication is
deferred until a product or a lookup has made an array; views keep it pending.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from eggroll.lazy.perturbed import LazyArray, PerturbedArray, is_perturbed, register, run_rule
from eggroll.lazy.ragged import ragged_p
from eggroll.noise.leaves import at_least_float32

_LINEAR = "dot_general conv_general_dilated transpose reshape squeeze broadcast_in_dim slice dynamic_slice split copy"
# Linear in the lazy operand, so that the result may be multiplied instead.
LINEAR = frozenset(_LINEAR.split()) | {ragged_p.name}


class Scaled(LazyArray):
    """gain * value."""

    value: PerturbedArray
    gain: Array  # [], float32 or wider

    def aval(self) -> Any:
        """Abstract value of the product."""
        return self.value.aval()

    def materialise(self) -> Array:
        """Refuse, as a perturbed parameter does."""
        return self.value.materialise()

    def source(self) -> str:
        """The path of the parameter."""
        return self.value.source()

    def read(self, where: str, reason: str, *, moves: bool) -> Array:
        """Return what an operation without a rule reads."""
        return times(self.value.read(where, reason, moves=moves), self.gain)

    def unpack(self) -> "Scaled":
        """The same value without packed signs."""
        return Scaled(self.value.unpack(), self.gain)

    def prepare_for_loops(self) -> "Scaled":
        """The same value in the form that a loop should read on every iteration."""
        return Scaled(self.value.prepare_for_loops(), self.gain)

    def settle(self) -> PerturbedArray:
        """Multiply base and scale by the scalar: every member then has a copy of the base."""

        def operation(array: Array, component: str) -> Array:
            return array if component in ("left", "right", "shared") else _scale(array, self.gain)

        return self.value.view(self.value.tags, operation)

    def pending(self, primitive: str, params: dict[str, Any]) -> tuple[PerturbedArray, Callable[[Any], Any]] | None:
        """The unscaled value, and the function that scales the results; None where the primitive is not linear."""
        fill = params.get("fill_value") if primitive == "gather" else None
        is_linear = primitive in LINEAR or (primitive == "gather" and (fill is None or fill == 0 or np.isnan(fill)))
        return (self.value, functools.partial(times, gain=self.gain)) if is_linear else None


def times(value: Any, gain: Array) -> Any:
    """A value, lazy or not, times a scalar."""
    if isinstance(value, Scaled):
        return Scaled(value.value, value.gain * gain.astype(value.gain.dtype))
    return Scaled(value, gain) if isinstance(value, PerturbedArray) else _scale(value, gain)


def _scale(array: Array, gain: Array) -> Array:
    """In the precision of the scalar, so that its perturbation survives in short floats."""
    wide = max(array.dtype, gain.dtype, key=lambda dtype: dtype.itemsize)
    return (array.astype(wide) * gain.astype(wide)).astype(array.dtype)


@register(jax.lax.mul_p)
def _product(a: LazyArray | ArrayLike, b: LazyArray | ArrayLike, **params: Any) -> Any:
    value, factor = (a, b) if is_perturbed(a) and jnp.ndim(b) == 0 else (b, a)
    return _by_number(jax.lax.mul_p, value, factor, [a, b], params)


@register(jax.lax.div_p)
def _quotient(value: LazyArray | ArrayLike, divisor: LazyArray | ArrayLike, **params: Any) -> Any:
    return _by_number(jax.lax.div_p, value, divisor, [value, divisor], params)


@register(jax.lax.neg_p)
def _negative(value: LazyArray, **params: Any) -> Any:
    if not _takes_gain(value):
        return LazyArray.default(jax.lax.neg_p, [value], params)
    return _by_number(jax.lax.mul_p, value, np.asarray(-1, value.aval().dtype), [], {})


def _takes_gain(value: Any) -> bool:
    return isinstance(value, Scaled | PerturbedArray) and bool(jnp.issubdtype(value.aval().dtype, jnp.floating))


def _by_number(primitive: Any, value: Any, number: Any, operands: list, params: dict[str, Any]) -> Any:
    """A lazy value multiplied or divided by a scalar; a scalar that is a parameter itself is built."""
    if jnp.ndim(number) or not _takes_gain(value):
        return LazyArray.default(primitive, operands, params)
    if is_perturbed(number):
        number = number.read(f"'{primitive.name}'", "used as a scalar factor", moves=False)
    inner, gain = (value.value, value.gain) if isinstance(value, Scaled) else (value, None)
    wide = at_least_float32(inner.base.dtype)
    gain = primitive.bind(jnp.ones((), wide) if gain is None else gain, jnp.asarray(number).astype(wide), **params)
    scaled = Scaled(inner, gain)
    # A constant is the same for all members: multiplied into the parameter at once, it costs no copies. float16 would overflow
    # in the product before its scalar makes it small.
    is_constant = isinstance(value, PerturbedArray) and not isinstance(number, jax.core.Tracer)
    return scaled.settle() if is_constant or inner.base.dtype == jnp.float16 else scaled


@register(jax.lax.convert_element_type_p)
def _convert(value: Scaled, *, new_dtype: Any, weak_type: bool, sharding: Any) -> Any:
    params = dict(new_dtype=new_dtype, weak_type=weak_type, sharding=sharding)
    floats = jnp.issubdtype(new_dtype, jnp.floating) and jnp.issubdtype(value.value.base.dtype, jnp.floating)
    if not floats:
        return LazyArray.default(jax.lax.convert_element_type_p, [value], params)
    inner = run_rule(jax.lax.convert_element_type_p, [value.value], params)
    return times(inner, value.gain.astype(at_least_float32(new_dtype)))
