"""Arrays that XLA computes once, where it would compute them again for every reader.

XLA fuses cheap operations into whatever reads them. So on CPU it decodes the signs of a factor again for every row of the
product that reads them, and computes an activation again for each of the two products that it enters. It does not fuse a
division into operations that read its results more than once, and drops `optimization_barrier` before it fuses; XLA for GPUs
keeps that.
"""

import jax
import jax.numpy as jnp
from jax import Array


def computed_once(array: Array) -> Array:
    """Return floats, words or int8 divided by a 1 that XLA cannot see through and LLVM can: equal, and no division is left.

    Arrays of other dtypes, and those of other backends, are returned as they are.
    """
    is_float, is_word = (jnp.issubdtype(array.dtype, kind) for kind in (jnp.floating, jnp.unsignedinteger))
    if jax.default_backend() != "cpu" or not (is_float or is_word or array.dtype == jnp.int8):
        return array
    word = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(array, word)
    zero = (bits & 1) >> 1
    if array.dtype == jnp.int8:
        return jax.lax.bitcast_convert_type(jax.lax.div(bits, zero | jnp.uint8(1)), array.dtype)
    one = jax.lax.bitcast_convert_type(jnp.ones((), array.dtype), word)
    return jax.lax.div(array, jax.lax.bitcast_convert_type(zero | one, array.dtype))


def rounded_once(array: Array) -> Array:
    """Return an array of which every reader sees the same bits, such as one that is summed to a checksum and stored.

    A value that is computed again for another reader may be rounded otherwise there: compilers fuse a multiplication and an
    addition in one loop and not in another. A division keeps XLA for CPU from it, a barrier XLA for GPUs.
    """
    return computed_once(array) if jax.default_backend() == "cpu" else jax.lax.optimization_barrier(array)
