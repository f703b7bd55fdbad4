"""Specification of the low-rank product: x E with E = sum_k first[..., k] second[..., k], E never built.

    hidden = (x . first) * scale        contracts the axes x shares with `first`
    out    = hidden . second            contracts the rank

Axes are named by integer labels, so one function serves dense layers, einsums, batched experts and embeddings.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from eggroll.kernels.factors import Noise, values_of


def lowrank_product(
    x: Array,
    first: Array,
    second: Array,
    *,
    scale: Array,
    x_axes: Sequence[int],
    first_axes: Sequence[int],
    second_axes: Sequence[int],
    scale_axes: Sequence[int],
    out_axes: Sequence[int],
    precision: jax.lax.PrecisionLike = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> Array:
    """Contract `x` with a low-rank matrix given by its factors.

    Args:
        x: activation, axes labelled `x_axes`.
        first: factor that shares x's contracted axes, axes `first_axes` and the rank last.
        second: the other factor, axes `second_axes` and the rank last.
        scale: multiplies the product, axes `scale_axes` (the stacked axes).
        x_axes, first_axes, second_axes, scale_axes, out_axes: integer labels, a label in common is contracted or batched.
        precision: passed to both products.
        dtype: accumulation and result dtype, the operands' own by default.

    Returns:
        The product with axes `out_axes`.
    """
    rank_label = 1 + max([*x_axes, *first_axes, *second_axes])
    # An axis that the other factor has too, stacked or inserted, is summed with the rank.
    contracted = {a for a in x_axes if a in first_axes and a not in out_axes and a not in second_axes}
    kept = [a for a in x_axes if a not in contracted] + [a for a in first_axes if a not in x_axes]
    hidden_axes = [*kept, rank_label]
    hidden = jnp.einsum(
        x,
        [*x_axes],
        first,
        [*first_axes, rank_label],
        hidden_axes,
        precision=precision,
        preferred_element_type=dtype,
    )
    hidden *= _aligned(scale.astype(hidden.dtype)[..., None], [*scale_axes], kept)
    sums_rank_alone = {*kept} <= {*out_axes}
    is_small = hidden.shape[-1] <= 8 and jax.default_backend() == "cpu"
    if sums_rank_alone and (jnp.issubdtype(hidden.dtype, jnp.integer) or is_small):
        return _mixed(hidden, hidden_axes, second.astype(hidden.dtype), [*second_axes, rank_label], [*out_axes])
    hidden = hidden.astype(second.dtype)
    return jnp.einsum(
        hidden,
        hidden_axes,
        second,
        [*second_axes, rank_label],
        [*out_axes],
        precision=precision,
        preferred_element_type=dtype,
    )


def _mixed(hidden: Array, hidden_axes: list[int], second: Array, second_axes: list[int], out_axes: list[int]) -> Array:
    """Contract the rank, the last axis of both, in their dtype.

    Term by term for small ranks, a multiply and an add that XLA fuses with what follows: on CPU its batched products over so
    few terms take several times as long (experiments/LOG.md).
    """
    rank = hidden.shape[-1]
    if rank > 8:
        return jnp.einsum(hidden, hidden_axes, second, second_axes, out_axes)
    hidden, second = _aligned(hidden, hidden_axes, out_axes), _aligned(second, second_axes, out_axes)
    return sum((hidden[..., k] * second[..., k] for k in range(1, rank)), start=hidden[..., 0] * second[..., 0])


def _aligned(array: Array, axes: list[int], out_axes: list[int]) -> Array:
    """Arrange all but the last axis as `out_axes`, of size 1 where the array has none."""
    kept = [axes.index(axis) for axis in out_axes if axis in axes]
    array = array.transpose([*kept, array.ndim - 1])
    return jnp.expand_dims(array, [at for at, axis in enumerate(out_axes) if axis not in axes])


def population_dot(x: Array, w: Array, noise: Noise, *, scale: Array, rank: int) -> Array:
    """Specification of `api.lowrank_dot`: the base product once for all rows, the low-rank product for every pair's rows."""
    values = values_of(noise, rank=rank, rows=w.shape[0], columns=w.shape[1], dtype=x.dtype)
    base = jnp.einsum("pjm,mn->pjn", x, w, preferred_element_type=jnp.float32)
    pair, row, m, n = range(4)
    left, right = (jnp.moveaxis(factor, 1, -1) for factor in values)
    term = lowrank_product(
        x,
        left,
        right,
        scale=scale,
        x_axes=(pair, row, m),
        first_axes=(pair, m),
        second_axes=(pair, n),
        scale_axes=(pair, row),
        out_axes=(pair, row, n),
        dtype=jnp.float32,
    )
    return (base + term).astype(x.dtype)
