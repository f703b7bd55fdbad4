"""What a front end carries with a durable run, next to the state: as a pytree, and as bytes in the journal."""

from typing import Any, Protocol

import jax
import numpy as np

from eggroll.journal import JournalError
from eggroll.state import keys_to_words, words_to_keys


class Carried(Protocol):
    """What a front end keeps besides the state, such as statistics of observations; stored with every generation."""

    def save(self) -> Any:
        """Return a pytree of arrays, always of the same structure, shapes and dtypes."""

    def load(self, saved: Any) -> None:
        """Restore from what `save` returned."""


def pack(carried: Any) -> bytes:
    """Return the bytes of a pytree of arrays and typed keys."""
    return b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(keys_to_words(carried)))


def unpack(extra: bytes, like: Any) -> Any:
    """Return the pytree of the bytes; JournalError if they are not as many as those of `like`, a pytree of its shapes."""
    arrays, tree = jax.tree.flatten(jax.tree.map(np.asarray, keys_to_words(like)))
    size, leaves, start = sum(array.nbytes for array in arrays), [], 0
    if size != len(extra):
        raise JournalError(f"the journal carries {len(extra)} bytes a generation, this run {size}.")
    for array in arrays:
        leaves.append(np.frombuffer(extra, array.dtype, array.size, offset=start).reshape(array.shape).copy())  # writable
        start += array.nbytes
    return words_to_keys(jax.tree.unflatten(tree, leaves), like)
