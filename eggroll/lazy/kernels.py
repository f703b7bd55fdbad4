"""Chooses the implementation of a parameter's products: plain JAX, or a kernel that evaluates a whole population.

A kernel is written for a population [P, R, m], the engine for one member. `population_product` is the bridge: a product of one
member, which under `vmap` over the signs and then over the pairs becomes one call of `kernels`. Any other use of it, such as
inputs that members share, falls back to the reference, batched by JAX: the plain product is then shared, too.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from eggroll.kernels import hopper
from eggroll.kernels.factors import Noise
from eggroll.kernels.int8_dot.api import int8_dot
from eggroll.kernels.lowrank_dot.api import lowrank_dot
from eggroll.kernels.lowrank_dot.config import RANKS
from eggroll.noise.factored import LowRankLeaf


def choose_implementation(leaf: LowRankLeaf, *, covered: bool) -> str:
    """The implementation of a leaf's products: "reference" or "mosaic_gpu".

    Args:
        leaf: the plan of a leaf with low-rank noise; its rule may ask for an implementation.
        covered: whether it is a matrix [rows, columns], in this order, that products read without a view.

    Raises:
        NotImplementedError: the kernel was asked for and does not cover the leaf, or cannot run here.
        ValueError: an unknown implementation.
    """
    (m, n), rank = leaf.matrix, leaf.rank

    def check() -> None:
        fits = covered and m % 128 == 0 and n % 64 == 0
        if leaf.integer:
            fits &= rank in (1, 4) and leaf.integer.scale[1] >= 0
        else:
            fits &= rank in RANKS and leaf.dtype == jnp.bfloat16
        if not fits:
            raise NotImplementedError(
                "implementation 'mosaic_gpu' takes matrices in multiples of 128 x 64, used as x W: bfloat16 of ranks 1 to 16, "
                f"int8 under integer noise of ranks 1 and 4; parameter '{leaf.path}' is {leaf.dtype} {list(leaf.shape)} with "
                f"rank {rank}, {leaf.reason}."
            )

    return hopper.choose_implementation(f"parameter '{leaf.path}'", leaf.spec.implementation, check)


def population_product(x: Array, w: Array, noise: Noise, scale: Array, *, rank: int, bits: int | None = None) -> Array:
    """x w + scale (x left^T) right of one member; a kernel's call under `vmap` over signs, then over pairs.

    Args:
        x: [R, m].
        w: [m, n].
        noise: of one pair, without a leading axis.
        scale: scalar, sign * sigma / sqrt(r); of integer noise the int32 sign.
        rank: r.
        bits: rounded away of integer noise; None: the operands are floats.

    Returns:
        [R, n] of x's dtype, int32 of integers.
    """
    form: Any = type(noise)
    return _of_one(form, rank, bits)(x, w, noise, scale)


def _of_one(form: Any, rank: int, bits: int | None) -> Callable:
    """The product of one member, whose batched form over the signs is `_of_pair`."""

    def one(x, w, noise, scale):
        return _call(rank, bits, "reference")(x[None], w, form(*(a[None] for a in noise)), scale[None])[0]

    return _batched(one, lambda x, w, noise, scale: x and scale and not w and not any(noise), _of_pair(form, rank, bits))


def _of_pair(form: Any, rank: int, bits: int | None) -> Callable:
    """The product of a pair's members, x [S, R, m] and scale [S], whose batched form over the pairs is the kernel's call."""

    def pair(x, w, noise, scale):
        alone = form(*(a[None] for a in noise))
        rows, scales = _rows(x[None], scale[None])
        return _call(rank, bits, "reference")(rows, w, alone, scales).reshape(*x.shape[:2], -1)

    def population(x, w, noise, scale):
        rows, scales = _rows(x, scale)
        return _call(rank, bits, "mosaic_gpu")(rows, w, noise, scales).reshape(*x.shape[:3], -1)

    return _batched(pair, lambda x, w, noise, scale: x and not w and all(noise), population)


def _rows(x: Array, scale: Array) -> tuple[Array, Array]:
    """[P, S, R, m] and [P, S] by the rows of a pair: [P, S R, m] and [P, S R]."""
    return x.reshape(x.shape[0], -1, x.shape[-1]), jnp.repeat(scale, x.shape[2], axis=1)


def _call(rank: int, bits: int | None, implementation: str) -> Callable:
    if bits is None:
        return lambda x, w, noise, scale: lowrank_dot(
            x, w, noise, scale=_spread(scale, x), rank=rank, implementation=implementation
        )
    return lambda x, w, noise, scale: int8_dot(x, w, noise, sign=_spread(scale, x), bits=bits, implementation=implementation)


def _spread(scale: Array, x: Array) -> Array:
    return jnp.broadcast_to(scale[:, None], x.shape[:2]) if scale.ndim == 1 else scale


def _batched(function: Callable, fits: Callable[..., bool], batched: Callable) -> Callable:
    """`function` with a custom batching rule: `batched` if the batched operands satisfy `fits`, else JAX's own batching."""
    product = jax.custom_batching.custom_vmap(function)

    @product.def_vmap
    def rule(axis_size, in_batched, x, w, noise, scale):
        x_batched, w_batched, noise_batched, scale_batched = in_batched
        if fits(x_batched, w_batched, tuple(noise_batched), scale_batched):
            if not scale_batched:  # the signs are the same for every pair
                scale = jnp.broadcast_to(scale, (axis_size, *jnp.shape(scale)))
            return batched(x, w, noise, scale), True
        axes = (_axis(x_batched), _axis(w_batched), type(noise)(*map(_axis, noise_batched)), _axis(scale_batched))
        return jax.vmap(function, in_axes=axes)(x, w, noise, scale), True

    return product


def _axis(is_batched: bool) -> int | None:
    return 0 if is_batched else None
