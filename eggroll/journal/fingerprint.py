"""The fingerprint of a pytree of arrays: equal if and only if two pytrees are equal byte for byte."""

import hashlib
from typing import Any

import jax

from eggroll.devices.processes import gather


def fingerprint(params: Any) -> str:
    """Return the SHA-256 of the leaves of a pytree: paths, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = gather(jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
