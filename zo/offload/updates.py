"""The pending update, applied to the resident parameters and to a block.

Noise, gradient and new values exist of a region of a resident parameter at a time, as in an update of the engine; of a block
they exist of one parameter at a time. A value that would not be finite stays as it was.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from eggroll.noise import addresses
from eggroll.noise.draws import leaf_keys
from eggroll.noise.leaves import LeafPlan
from eggroll.noise.once import computed_once
from eggroll.noise.plan import Plan
from eggroll.noise.regions import BlockGrid, Region, cut
from eggroll.noise.rules import Frozen
from eggroll.update.checksums import has_checksum, sum_array
from eggroll.update.estimator import region_gradient
from eggroll.update.precision import is_low, store
from eggroll.zo.offload.devices import Devices, Sliced, hash_words, is_sliced
from eggroll.zo.offload.state import Pending
from eggroll.zo.optimizers.descent import Descent


def update_resident(descent: Descent, plan: Plan, resident: Any, pending: Pending, run_key: Array) -> tuple[Any, Array]:
    """Apply the pending update to the resident parameters, region by region and in place.

    Args:
        descent: the update.
        plan: of the resident parameters.
        resident: the parameters.
        pending: the update.
        run_key: of the run.

    Returns:
        The new parameters, and the checksums before and after, uint32 [2, leaves].
    """
    sums: dict[str, Array] = {}  # of every parameter that is updated, uint32 [2]

    def update(leaf: Array, planned: LeafPlan, key: Array) -> Array:
        def of_region(values: Array, region: Region) -> tuple[Array, Array]:
            def estimate(coefficients: Array, *, noise_generation: Array, sigma: Array) -> Array:
                key = leaf_keys([planned], run_key, noise_generation)[0]
                about = functools.partial(region_gradient, key=key, noise_key=run_key, noise_generation=noise_generation)
                return about(planned, region, coefficients, sigma=sigma)

            new = _updated(descent, values, planned, _ascent(descent, pending, estimate), pending)
            if is_low(leaf):
                new = store(new, leaf.dtype, on_grid=False, words=hash_words(key, _places(leaf.shape, region)))
            new = _finite(new, values)
            return new, _sum_both(planned, region, values, new)

        def update_next(index: Array, carry: tuple[Array, Array], blocks: BlockGrid) -> tuple[Array, Array]:
            (leaf, before), region = carry, blocks.region(index)
            old = jax.lax.dynamic_slice(leaf, region.starts, region.sizes)
            old = computed_once(jax.lax.optimization_barrier(old))  # read before it is overwritten: else XLA copies `leaf`
            new, own = of_region(old, region)
            return jax.lax.dynamic_update_slice(leaf, new.astype(leaf.dtype), region.starts), before + own

        own = jnp.zeros(2, jnp.uint32)
        for blocks in cut(planned, leaf.shape):
            if len(blocks) == 1 and blocks.sizes == leaf.shape:
                leaf, own = of_region(leaf, blocks.region(0))
            else:
                leaf, own = jax.lax.fori_loop(0, len(blocks), functools.partial(update_next, blocks=blocks), (leaf, own))
        sums[planned.path] = own
        return leaf

    def sums_of(planned: LeafPlan, leaf: Array) -> Array:
        own = sums[planned.path] if planned.path in sums else sum_array(leaf)
        return jnp.broadcast_to(own if has_checksum(planned) else jnp.uint32(0), 2)

    new = _update_leaves(update, plan, resident, pending, run_key, 0)
    return new, jnp.stack([sums_of(*pair) for pair in zip(plan.leaves, jax.tree.leaves(new), strict=True)], axis=1)


def update_block(
    descent: Descent, plan: Plan, block: Any, pending: Pending, run_key: Array, index: Array, *, devices: Devices
) -> Any:
    """Apply the pending update to this device's slices of a block.

    Args:
        descent: the update.
        plan: of one block.
        block: a pytree of `Sliced`.
        pending: the update.
        run_key: of the run.
        index: int32 [], of the block.
        devices: that hold the slices.
    """

    def update(leaf: Sliced, planned: LeafPlan, key: Array) -> Sliced:
        estimate = functools.partial(devices.slice_of_gradient, planned, noise_key=run_key, first_index=index)
        new = _updated(descent, leaf.values, planned, _ascent(descent, pending, estimate), pending)
        if is_low(leaf.values):
            new = store(new, leaf.values.dtype, on_grid=False, words=devices.slice_of_words(key, new.size))
        return dataclasses.replace(leaf, values=_finite(new, leaf.values))

    return _update_leaves(update, plan, block, pending, run_key, index)


def _sum_both(planned: LeafPlan, region: Region, *arrays: Array) -> Array:
    """What regions of a parameter add to its checksums, uint32 [arrays]."""
    return jnp.stack([sum_array(array, shape=planned.shape, starts=region.starts) for array in arrays])


def _places(shape: tuple[int, ...], region: Region) -> Array:
    """Where the entries of a region are in the whole parameter, uint32 of the region's sizes."""
    place = jnp.zeros(region.sizes, jnp.uint32)
    for axis, (start, size) in enumerate(zip(region.starts, shape, strict=True)):
        along = jnp.asarray(start).astype(jnp.uint32) + jax.lax.broadcasted_iota(jnp.uint32, region.sizes, axis)
        place = place * jnp.uint32(size) + along
    return place


def _update_leaves(update: Callable, plan: Plan, tree: Any, pending: Pending, run_key: Array, index: Array | int) -> Any:
    """Call `update(leaf, planned, rounding key)` for every leaf that is not frozen."""
    rounding = jax.random.fold_in(addresses.stream_key(run_key, 2), pending.generation)
    rounding = jax.random.fold_in(rounding, index)

    def of_leaf(leaf: Any, planned: LeafPlan) -> Any:
        if isinstance(planned.spec, Frozen):
            return leaf
        return update(leaf, planned, jax.random.fold_in(rounding, zlib.crc32(planned.path.encode())))

    leaves = zip(jax.tree.leaves(tree, is_leaf=is_sliced), plan.leaves, strict=True)
    return jax.tree.unflatten(plan.tree, [of_leaf(*leaf) for leaf in leaves])


def _ascent(descent: Descent, pending: Pending, estimate: Callable[..., Array]) -> Array:
    """The ascent of the step whose update is pending; `estimate(coefficients, noise_generation=, sigma=)` is that of a step."""
    if descent.adam is None or pending.history is None:
        return estimate(pending.coefficients, noise_generation=pending.generation, sigma=pending.sigma)
    return descent.adam.ascent(pending.history, estimate)


def _finite(new: Array, old: Array) -> Array:
    """The new values, and the old ones where those would not be finite."""
    return jnp.where(jnp.isfinite(new), new, old.astype(new.dtype))


def _updated(descent: Descent, values: Array, planned: LeafPlan, ascent: Array, pending: Pending) -> Array:
    """Float32 values after the pending update; the same bits where nothing is pending."""
    wide = values.astype(jnp.float32)
    decay = descent.weight_decay if descent.decays_at(planned.path) else 0.0
    return jnp.where(pending.rate == 0, wide, wide + pending.rate * (ascent / pending.scale - decay * wide))
