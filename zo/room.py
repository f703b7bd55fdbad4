"""Whether a model fits, from the shapes of its parameters alone: before a run copies them, or reads them at all.

    resident     a device: the parameters, and float32 masters of short ones that have them
    offloaded    one device: the resident parameters and three blocks (in use, on its way up, on its way down)
                 one of N devices: the resident parameters, a block, and its slices of three
                 the host: all blocks; in the type in which they are stored, as on the devices

A lower bound, without activations and temporaries. The devices of a CPU share the host's memory.
"""

import math
import os
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from eggroll.devices.chunking import free_bytes, free_host_bytes
from eggroll.noise.rules import Perturbation, trainable
from eggroll.update.precision import is_low

PINNED_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"  # of the host's memory that CUDA transfers from; 64 unless it is set
BLOCKS_ON_DEVICE = 3


class Need(NamedTuple):
    """What a run needs in addition to what it holds already, in bytes."""

    what: str  # lies on a device
    device: int  # on each device
    held: int = 0  # there already, of `device`
    host: int = 0  # of blocks in the memory of this host
    read: int = 0  # of the whole model, which the host holds as well while it is read or written


def devices_of(mesh: Mesh | None) -> list[Any]:
    """The devices of this process that a run uses."""
    return jax.local_devices()[:1] if mesh is None else list(mesh.local_devices)


def resident_need(params: Any, devices: Sequence[Any], *, masters: Sequence[bool], donate: bool = False) -> Need:
    """Return what a run needs whose devices hold all parameters, or their shards of those that are sharded.

    Args:
        params: a pytree of arrays or shapes.
        devices: of the run.
        masters: whether a leaf has a float32 copy.
        donate: arrays that lie on the devices are taken over, not copied.
    """
    leaves = jax.tree.leaves(params)
    size = sum(_on_device(leaf) * (leaf.dtype.itemsize + 4 * copied) for leaf, copied in zip(leaves, masters, strict=True))
    taken = [leaf for leaf in leaves if donate and isinstance(leaf, jax.Array) and leaf.sharding.device_set & set(devices)]
    what = "the parameters" + " and float32 masters of them" * any(masters)
    return Need(what, size, held=sum(_on_device(leaf) * leaf.dtype.itemsize for leaf in taken))


def offloaded_need(params: Any, mesh: Mesh, *, transfer_dtype: Any) -> Need:
    """Return what a run needs whose blocks stay in the host's memory.

    Args:
        params: {"resident": ..., "blocks": ...}, arrays or shapes.
        mesh: of the devices.
        transfer_dtype: of float32 blocks in the host's memory and on their way; None: unchanged.
    """
    leaves = jax.tree.leaves(params["blocks"])
    blocks = sum(math.prod(leaf.shape) * _stored(leaf, transfer_dtype).itemsize for leaf in leaves)
    layers, resident = leaves[0].shape[0], _bytes(params["resident"])
    held, block = min(BLOCKS_ON_DEVICE, layers), blocks // layers
    what = f"the parameters outside the blocks and {held} of {layers} blocks"
    if mesh.size > 1:
        what = f"the parameters outside the blocks, a block and slices of {held} of {layers}"
    on_device = block * held if mesh.size == 1 else block + block * held // mesh.size
    return Need(what, resident + on_device, host=blocks * len(mesh.local_devices) // mesh.size)


def stores_float32(params: Any, transfer_dtype: Any = None) -> bool:
    """Whether a shorter type would save memory."""
    return any(_stored(leaf, transfer_dtype) == jnp.float32 for leaf in jax.tree.leaves(params))


def check_room(need: Need, devices: Sequence[Any], advice: Collection[str], *, on_device: Collection[str] = ()) -> None:
    """Raise ValueError where the memory has no room: by how much, and what needs less.

    Args:
        need: see there.
        devices: of this process.
        advice: what needs less, such as "--offload".
        on_device: what needs less of a device alone.
    """
    count, platform = len(devices), devices[0].platform
    where = f"{count} {platform} device{'s' * (count > 1)}"
    parts = f"{'each device holds' if count > 1 else 'the device holds'} {need.what}"
    blocks = "the host holds all blocks" + " and, at start and end, the model" * bool(need.read)
    if platform == "cpu":
        told, host = f"{parts}; {blocks}" if need.host else parts, need.host + need.read
        _check(told, where, count * need.device + host - need.held, free_host_bytes(), [*advice, *on_device])
        return
    where, free = f"each of {where}" if count > 1 else where, min(map(free_bytes, devices))
    _check(parts, where, need.device - need.held, free, [*advice, *on_device])
    _check(blocks, "the host", need.host + need.read, free_host_bytes(), advice)
    if platform == "gpu":
        pinned = int(float(os.environ.get(PINNED_LIMIT, 64)) * 2**30)
        _check("the host holds all blocks", "the host, pinned", need.host, pinned, [*advice, f"a higher {PINNED_LIMIT}"])


def _check(what: str, where: str, needed: int, free: int, advice: Collection[str]) -> None:
    if needed > free:
        needs, has, lacks = (f"{size / 1e9:.3g} GB" for size in (needed, free, needed - free))
        tried = ", or ".join(advice or ["a smaller model"])
        raise ValueError(
            f"the model does not fit: {what}. That needs {needs} on {where}; {has} are free, {lacks} too few. Try {tried}."
        )


def check_resident(params: Any, mesh: Mesh | None, *, precision: str, perturbation: Perturbation, donate: bool) -> None:
    """Raise ValueError if the devices have no room for the parameters; nothing is checked of arrays that are being traced.

    Args:
        params: arrays.
        mesh: of the devices; None: the default device.
        precision: of the update; "master" keeps float32 copies of short parameters that are not frozen.
        perturbation: says which are frozen.
        donate: as for `resident_need`.
    """
    leaves = jax.tree.leaves(params)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return
    devices, moving = devices_of(mesh), jax.tree.leaves(trainable(params, perturbation))
    masters = [precision == "master" and is_low(leaf) and moves for leaf, moves in zip(leaves, moving, strict=True)]
    need = resident_need(params, devices, masters=masters, donate=donate)
    shorter = ["bfloat16 parameters with precision='stochastic'"] if stores_float32(params) else []
    shorter = ["precision='stochastic'"] if any(masters) else shorter
    on_cpu, offload = devices[0].platform == "cpu", ["zo.Offload"]
    if on_cpu and not any(masters):  # its memory is the host's, too
        offload = ["zo.Offload with transfer_dtype=jnp.bfloat16"] if stores_float32(params) else []
    fewer = ["fewer devices"] if on_cpu and len(devices) > 1 else []
    check_room(need, devices, [*fewer, *offload, *shorter])


def check_offloaded(params: Any, mesh: Mesh, *, transfer_dtype: Any) -> None:
    """Raise ValueError if the host has no room for the blocks, or a device for what it holds; see `offloaded_need`."""
    shorter = ["transfer_dtype=jnp.bfloat16"] if stores_float32(params["blocks"], transfer_dtype) else []
    shorter += ["bfloat16 parameters"] if stores_float32(params) else []
    need = offloaded_need(params, mesh, transfer_dtype=transfer_dtype)
    check_room(need, mesh.local_devices, shorter, on_device=["more blocks of fewer layers"])


def _stored(leaf: Any, transfer_dtype: Any) -> Any:
    return jnp.dtype(transfer_dtype) if transfer_dtype is not None and leaf.dtype == jnp.float32 else leaf.dtype


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _on_device(leaf: Any) -> int:
    """Values of a leaf on one device: those of its shard where it is sharded already."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape) if isinstance(leaf, jax.Array) else leaf.shape)
