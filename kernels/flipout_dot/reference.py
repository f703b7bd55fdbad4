"""Specification of the Flipout product: x (U o first second^T), where only the signs differ from member to member.

    out = ((x o first) . shared) o (scale second)

Under vmap over members `shared` is not batched: all of them go through one product with it. Axes are named by integer labels,
as in `lowrank_dot`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array


def flipout_product(
    x: Array,
    first: Array,
    second: Array,
    shared: Array,
    *,
    scale: Array,
    x_axes: Sequence[int],
    first_axes: Sequence[int],
    second_axes: Sequence[int],
    shared_axes: Sequence[int],
    scale_axes: Sequence[int],
    out_axes: Sequence[int],
    precision: jax.lax.PrecisionLike = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> Array:
    """Contract `x` with U o (first second^T).

    Args:
        x: activation, axes labelled `x_axes`.
        first: signs of the contracted side, axes `first_axes` and one of size 1, the rank.
        second: signs of the other side, axes `second_axes` and one of size 1.
        shared: U, axes `shared_axes`.
        scale: multiplies the product, axes `scale_axes` (the stacked axes).
        x_axes, first_axes, second_axes, shared_axes, scale_axes, out_axes: integer labels, a label in common is contracted or
            batched.
        precision: passed to the product.
        dtype: accumulation and result dtype, the operands' own by default.

    Returns:
        The product with axes `out_axes`.
    """
    axes = [*x_axes, *(a for a in first_axes if a not in x_axes)]  # a stacked axis that x does not have
    flipped = _times(x.reshape(*x.shape, *[1] * (len(axes) - x.ndim)), axes, first[..., 0], first_axes)
    out = jnp.einsum(flipped, axes, shared, [*shared_axes], [*out_axes], precision=precision, preferred_element_type=dtype)
    return _times(_times(out, out_axes, second[..., 0], second_axes), out_axes, scale, scale_axes)


def _times(array: Array, axes: Sequence[int], factor: Array, factor_axes: Sequence[int]) -> Array:
    """Multiply by a factor that has some of the array's axes."""
    order = [factor_axes.index(a) for a in axes if a in factor_axes]
    sizes = [factor.shape[factor_axes.index(a)] if a in factor_axes else 1 for a in axes]
    return array * factor.transpose(order).reshape(sizes).astype(array.dtype)
