"""Arrays that XLA computes once on CPU, where it would compute them again for every reader.

XLA fuses cheap operations into whatever reads them. So it decodes the signs of a factor again for every row of the product
that reads them, and computes an activation again for each of the two products that it enters. It does not fuse a division
into operations that read its results more than once, and drops `optimization_barrier` before it fuses.
"""

import jax
import jax.numpy as jnp
from jax import Array


def computed_once(array: Array) -> Array:
    """Return a float or int8 array divided by a 1 that XLA cannot see through and LLVM can: equal, and no division is left.

    Arrays of other dtypes, and those of other backends, are returned as they are.
    """
    if jax.default_backend() != "cpu" or not (jnp.issubdtype(array.dtype, jnp.floating) or array.dtype == jnp.int8):
        return array
    word = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(array, word)
    zero = (bits & 1) >> 1
    if array.dtype == jnp.int8:
        return jax.lax.bitcast_convert_type(jax.lax.div(bits, zero | jnp.uint8(1)), array.dtype)
    one = jax.lax.bitcast_convert_type(jnp.ones((), array.dtype), word)
    return array / jax.lax.bitcast_convert_type(zero | one, array.dtype)
