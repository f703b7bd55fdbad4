"""Sums over the pairs: sum_p d_p E_p of a parameter or a part of it, the noise drawn in chunks of pairs.

Low-rank noise is one matrix product over K = P r for each chunk, in float32, or in int32 for int8 parameters.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from eggroll.kernels.factors import Signs, Values
from eggroll.kernels.lowrank_update import api as update_kernel
from eggroll.kernels.lowrank_update.reference import integer_lowrank_update
from eggroll.noise import draws
from eggroll.noise.addresses import Factors
from eggroll.noise.factored import FactoredLeaf, LowRankLeaf
from eggroll.noise.leaves import LeafPlan, PerturbedLeaf
from eggroll.noise.once import rounded_once

NOISE_BUDGET = 64 << 20  # bytes of noise drawn at once for one leaf or block
SHARED_BUDGET = 256 << 10  # bytes of random words that small parameters draw together


def sum_dtype(coefficients: Array) -> Any:
    """Dtype of the sums."""
    return jnp.int32 if jnp.issubdtype(coefficients.dtype, jnp.integer) else jnp.float32


def draw_together(
    leaves: Sequence[LeafPlan], keys: Sequence[draws.LeafKeys], num_pairs: int, first_pair: Array | int
) -> dict[int, Factors | Array]:
    """The noise [P, ...] of small parameters, by their index: on CPU a call of the generator costs more than their words.

    Args:
        leaves: all plans.
        keys: of every leaf, from `draws.leaf_keys`.
        num_pairs: P.
        first_pair: index in the population of the first pair.
    """
    if jax.default_backend() != "cpu":
        return {}
    chosen: dict[int, PerturbedLeaf] = {}
    free = SHARED_BUDGET
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, PerturbedLeaf) and leaf.refresh == 1 and num_pairs * _held_bytes(leaf) <= NOISE_BUDGET:
            words = 4 * num_pairs * leaf.words * math.prod(leaf.sizes(leaf.stack))
            if words <= free:
                chosen[index], free = leaf, free - words
    pairs = first_pair + jnp.arange(num_pairs, dtype=jnp.int32)
    drawn = jax.vmap(lambda pair: draws.draw(list(chosen.values()), [keys[index] for index in chosen], pair))(pairs)
    return dict(zip(chosen, drawn, strict=True))


def sum_over_pairs(leaf: PerturbedLeaf, draw: Callable, coefficients: Array, first_pair: Array | int) -> Array:
    """sum_p d_p E_p, without the 1 / sqrt(r) and without what all pairs share.

    Args:
        leaf: the plan of what is summed, which may be a part of a leaf.
        draw: from pair to its noise.
        coefficients: [P], or those of some pairs.
        first_pair: index in the population of the first coefficient's pair.
    """
    num_pairs = coefficients.shape[0]
    chunk = max(1, min(num_pairs, NOISE_BUDGET // (_held_bytes(leaf) or 1)))
    for_all = num_pairs // chunk * chunk

    def add_chunk(total, start):
        pairs = first_pair + start + jnp.arange(chunk, dtype=jnp.int32)
        own = jax.lax.dynamic_slice(coefficients, (start,), (chunk,))
        return total + _weighted_noise(leaf, draw, pairs, own), None

    if for_all == chunk:
        total = _weighted_noise(leaf, draw, first_pair + jnp.arange(chunk, dtype=jnp.int32), coefficients[:chunk])
    else:
        total = jnp.zeros(_sum_shape(leaf), sum_dtype(coefficients))
        total, _ = jax.lax.scan(add_chunk, total, jnp.arange(0, for_all, chunk, dtype=jnp.int32))
    if for_all < num_pairs:
        rest = first_pair + jnp.arange(for_all, num_pairs, dtype=jnp.int32)
        total += _weighted_noise(leaf, draw, rest, coefficients[for_all:])
    return total


def _uses_kernel(leaf: PerturbedLeaf) -> bool:
    """Whether a kernel sums the noise; it takes tiles of 128 x 64, which a part of a covered parameter need not fill."""
    if not isinstance(leaf, LowRankLeaf) or leaf.implementation == "reference":
        return False
    m, n = leaf.matrix
    return m % 128 == 0 and n % 64 == 0


def _held_bytes(leaf: PerturbedLeaf) -> int:
    """Bytes of one pair's noise while it is summed: packed signs for a kernel, which unpacks them itself, else float32."""
    packed = _uses_kernel(leaf) and leaf.distribution == "rademacher"
    return 4 * (leaf.words if packed else leaf.values) * math.prod(leaf.sizes(leaf.stack))


def _sum_shape(leaf: PerturbedLeaf) -> tuple[int, ...]:
    return (*leaf.sizes(leaf.stack), *leaf.matrix) if isinstance(leaf, FactoredLeaf) else leaf.shape


def _weighted_noise(leaf: PerturbedLeaf, draw: Callable, pairs: Array, coefficients: Array) -> Array:
    """`sum_over_pairs` of few enough pairs."""
    return weigh(leaf, jax.vmap(draw)(pairs), coefficients)


def weigh(leaf: PerturbedLeaf, drawn: Factors | Array, coefficients: Array) -> Array:
    """`sum_over_pairs` of noise [P, ...] that is drawn already."""
    if leaf.integer:
        return _integer_sum(coefficients, jax.tree.map(jnp.sign, drawn) if leaf.integer.sums_signs else drawn)
    if isinstance(drawn, Factors):
        if _uses_kernel(leaf):
            return sum_by_kernel(coefficients, drawn)
        left, right = (factor.astype(jnp.float32) for factor in drawn.as_matrices(leaf.noise_dtype))
        weights = jnp.tile(coefficients, drawn.rank)
        return jnp.einsum("...mk,...kn->...mn", left * weights, right, precision=jax.lax.Precision.HIGHEST)
    drawn = drawn.astype(jnp.float32)
    if math.prod(drawn.shape[1:]) == 1:
        return _sum_in_halves(coefficients.reshape(-1, *[1] * (drawn.ndim - 1)) * drawn)
    return jnp.tensordot(coefficients, drawn, axes=1)


def _sum_in_halves(terms: Array) -> Array:
    """Sum over the first axis, in an order of its own: a sum with one entry gets its order from what XLA fuses it with."""
    terms = rounded_once(terms)
    while (half := terms.shape[0] // 2) > 0:
        terms = jnp.concatenate([rounded_once(terms[:half] + terms[half : 2 * half]), terms[2 * half :]])
    return terms[0]


def _integer_sum(coefficients: Array, drawn: Factors | Array) -> Array:
    if isinstance(drawn, Factors):
        return integer_lowrank_update(coefficients, *drawn.unpack(jnp.int8))
    return jnp.tensordot(coefficients, drawn.astype(coefficients.dtype), axes=1, preferred_element_type=jnp.int32)


def sum_by_kernel(coefficients: Array, factors: Factors) -> Array:
    """sum_p coefficients[p] left[p]^T right[p] of every layer, by the kernel.

    Args:
        coefficients: float32 [P].
        factors: [P, *stack, r, m] and [P, *stack, r, n], packed or not.

    Returns:
        float32 [*stack, m, n].
    """
    packed = factors.words is not None
    arrays = [a for a in (factors.words, factors.left, factors.right) if a is not None]
    trailing = 1 if packed else 2
    stack = arrays[0].shape[1 : arrays[0].ndim - trailing]

    def layer(parts):
        return update_kernel.lowrank_update(
            coefficients,
            Signs(*parts) if packed else Values(*parts),
            rank=factors.rank,
            rows=factors.m,
            columns=factors.n,
            implementation="mosaic_gpu",
        )

    layers = [jnp.moveaxis(a.reshape(a.shape[0], -1, *a.shape[a.ndim - trailing :]), 1, 0) for a in arrays]
    total = jax.lax.map(layer, layers) if stack else layer([a[0] for a in layers])
    return total.reshape(*stack, factors.m, factors.n)
