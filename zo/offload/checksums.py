"""Checksums of an offloaded state (`eggroll.update.checksums`), formed while its blocks pass the device.

The arrays, in this order: resident parameters, blocks, the pending update, the moment, the key. The blocks of a parameter have
the checksum of the stacked array, in the dtype that they are stored in. A state is summed as it is, its last update pending.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from eggroll.noise.plan import Plan
from eggroll.update.checksums import entry_terms, has_checksum, names_of, place_weights, reduce_together, sum_array
from eggroll.zo.offload.devices import AXES, Sliced, is_sliced


def checksum_names(state: Any) -> list[str]:
    """Return the names of the arrays that have a checksum, in order."""
    block = jax.tree.map(lambda leaf: 0, state.blocks[0], is_leaf=is_sliced)
    parts = {"resident": state.resident, "blocks": block, "pending": state.pending, "moment": state.moment}
    return [*(name for part, tree in parts.items() for name in names_of(part, tree)), "key"]


def sum_resident(plan: Plan, resident: Any) -> Array:
    """Return the checksums of the resident parameters, uint32 [leaves]."""
    return _sum(plan, sum_array, jax.tree.leaves(resident))


def sum_block(plan: Plan, block: Any, index: Array) -> Array:
    """Return what a block adds to the checksums of the stacked arrays, uint32 [leaves]; from its slices on all devices."""

    def of_slice(leaf: Sliced) -> Array:
        size, count = math.prod(leaf.shape), leaf.values.size
        first = jax.lax.axis_index(AXES) * count
        weights = place_weights((1, size), (index, first), (1, count))[0]
        is_padding = first + jnp.arange(count) >= size
        terms, zero = entry_terms(leaf.values, weights), jnp.uint32(0)
        odd = (weights >> 1) & 1 == 1  # as in `sum_array`
        parts = jnp.where(odd & ~is_padding, terms, zero), jnp.where(odd | is_padding, zero, terms)
        _, sums = reduce_together([], parts)
        return sums[0] + sums[1]

    return jax.lax.psum(_sum(plan, of_slice, jax.tree.leaves(block, is_leaf=is_sliced)), AXES)


def sum_rest(state: Any) -> Array:
    """Return the checksums of the pending update, the moment and the key, uint32 [arrays]."""
    return jnp.stack([*map(sum_array, jax.tree.leaves((state.pending, state.moment))), sum_array(state.key)])


def _sum(plan: Plan, of_leaf: Callable, leaves: Sequence[Any]) -> Array:
    pairs = zip(plan.leaves, leaves, strict=True)
    return jnp.stack([of_leaf(array) if has_checksum(leaf) else jnp.uint32(0) for leaf, array in pairs])
