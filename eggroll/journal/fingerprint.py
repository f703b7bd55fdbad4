"""The fingerprint of a pytree of arrays: equal if and only if two pytrees are equal byte for byte.

Leaves are hashed one by one. Host memory holds a piece of a leaf on an accelerator, a copy of one over several devices, and
nothing in addition to a leaf on one CPU device.
"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax import lax

from eggroll.devices.processes import gather

PIECE = 1 << 26  # bytes


def fingerprint(params: Any) -> str:
    """Return the SHA-256 of the leaves of a pytree: paths, dtypes, shapes and bytes."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return fingerprint_of_leaves((jax.tree_util.keystr(path), leaf) for path, leaf in leaves)


def fingerprint_of_leaves(leaves: Iterable[tuple[str, Any]]) -> str:
    """Return the fingerprint of a pytree from the paths of its leaves, in order."""
    digest = hashlib.sha256()
    for path, leaf in leaves:
        array = jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        digest.update(f"{path} {array.dtype} {array.shape};".encode())
        for piece in _pieces(array):
            digest.update(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _pieces(array: Any) -> Iterator[np.ndarray]:
    """The bytes of an array in order; it keeps no copy of them (`np.asarray` of an array on an accelerator does)."""
    if not isinstance(array, jax.Array) or _is_on_host(array):
        yield np.asarray(array)
    elif len(array.devices()) > 1:
        parts = [shard.data for shard in array.addressable_shards]
        yield gather(jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts))  # it keeps the copy
    else:
        array = array.reshape(1) if array.ndim == 0 else array
        rows = max(1, PIECE * array.shape[0] // max(1, array.nbytes))
        for start in range(0, array.shape[0], rows):
            yield np.asarray(lax.dynamic_slice_in_dim(array, start, min(rows, array.shape[0] - start)))


def _is_on_host(array: jax.Array) -> bool:
    """Whether `np.asarray` needs no copy."""
    return [device.platform for device in array.devices()] == ["cpu"]
