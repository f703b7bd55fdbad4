"""What a front end carries with a durable run, next to the state: as a pytree, and as bytes in the journal."""

from typing import Any, Protocol

import jax
import numpy as np

from eggroll.journal import JournalError


class Carried(Protocol):
    """What a front end keeps besides the state, such as statistics of observations; stored with every generation."""

    def save(self) -> Any:
        """Return a pytree of arrays, always of the same structure, shapes and dtypes."""

    def load(self, saved: Any) -> None:
        """Restore from what `save` returned."""


def pack(carried: Any) -> bytes:
    """Return the bytes of a pytree of arrays."""
    return b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(carried))


def unpack(extra: bytes, like: Any) -> Any:
    """Return the pytree of the bytes; JournalError if they are not as many as those of `like`, a pytree of its shapes."""
    leaves, tree, start = [], jax.tree.structure(like), 0
    for leaf in map(np.asarray, jax.tree.leaves(like)):
        leaves.append(np.frombuffer(extra, leaf.dtype, leaf.size, offset=start).reshape(leaf.shape))
        start += leaf.nbytes
    if start != len(extra):
        raise JournalError(f"the journal carries {len(extra)} bytes a generation, this run {start}.")
    return jax.tree.unflatten(tree, leaves)
