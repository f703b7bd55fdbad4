"""Whether a model fits, from the shapes of its parameters, before a run copies them.

A lower bound: parameters alone, without activations and temporaries. The devices of a CPU share the host's memory.
"""

import math
import os
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from eggroll.devices.chunking import free_bytes, free_host_bytes

PINNED_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"  # of the host's memory that CUDA transfers from; 64 unless it is set


def check_resident(params: Any, mesh: Mesh | None, *, donate: bool) -> None:
    """Raise ValueError if the devices have no room for the parameters; by how much, and what to do.

    Args:
        params: a pytree of arrays; nothing is checked of arrays that are being traced.
        mesh: each device holds all parameters, or its shards of those that are sharded; None: the default device.
        donate: the parameters are taken over, not copied.
    """
    leaves = jax.tree.leaves(params)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return
    devices = jax.local_devices()[:1] if mesh is None else mesh.local_devices
    size = sum(map(_bytes_of_shard, leaves))
    held = size if donate else 0
    advice = f"{'' if mesh is None else 'fewer devices, '}zo.Offload or bfloat16 parameters need less"
    if devices[0].platform == "cpu":
        _check("the parameters", devices, len(devices) * size - held, free_host_bytes(), advice)
    else:
        _check("the parameters, on each device,", devices, size - held, min(map(free_bytes, devices)), advice)


def check_offloaded(params: Any, mesh: Mesh, *, transfer_dtype: Any) -> None:
    """Raise ValueError if the host has no room for the blocks, or a device for the resident parameters and two blocks.

    Args:
        params: {"resident": ..., "blocks": ...}, arrays.
        mesh: of the devices.
        transfer_dtype: of float32 blocks in the host's memory; None: unchanged.
    """
    devices, blocks = mesh.local_devices, jax.tree.leaves(params["blocks"])
    as_stored = [transfer_dtype if transfer_dtype is not None and leaf.dtype == "float32" else leaf.dtype for leaf in blocks]
    stored = sum(leaf.size * dtype.itemsize for leaf, dtype in zip(blocks, map(jax.numpy.dtype, as_stored), strict=True))
    stored = stored * len(devices) // mesh.size
    on_device = sum(map(_bytes, jax.tree.leaves(params["resident"]))) + 2 * sum(map(_bytes, blocks)) // blocks[0].shape[0]
    advice = "bfloat16 parameters need less" if transfer_dtype is not None else "transfer_dtype=jnp.bfloat16 needs less"
    if devices[0].platform == "cpu":
        needed = stored + len(devices) * on_device
        _check("the blocks, and on each device resident parameters and two blocks,", devices, needed, free_host_bytes(), advice)
        return
    pinned = int(float(os.environ.get(PINNED_LIMIT, 64)) * 2**30)
    advice = f"{advice}; {PINNED_LIMIT} limits what CUDA may use"
    _check("the blocks, in the host's memory,", devices, stored, min(free_host_bytes(), pinned), advice)
    smaller = "more blocks of fewer layers need less"
    _check("resident parameters and two blocks, on each device,", devices, on_device, min(map(free_bytes, devices)), smaller)


def _check(what: str, devices: Sequence[Any], needed: int, free: int, advice: str) -> None:
    if needed > free:
        needs, has, lacks = (f"{size / 1e9:.3g} GB" for size in (needed, free, needed - free))
        where = f"{len(devices)} {devices[0].platform} device{'s' if len(devices) > 1 else ''}"
        raise ValueError(f"{what} need {needs} on {where}, {has} are free, {lacks} too few: {advice}.")


def _bytes(leaf: Any) -> int:
    return leaf.size * leaf.dtype.itemsize


def _bytes_of_shard(leaf: Any) -> int:
    """Bytes of a leaf on one device: of its shard where it is sharded already."""
    shape = leaf.sharding.shard_shape(leaf.shape) if isinstance(leaf, jax.Array) else leaf.shape
    return math.prod(shape) * leaf.dtype.itemsize
