"""The form in which a state is in a checkpoint: keys as words, the shape of an empty array in its place."""

from typing import Any

import jax
import numpy as np

from eggroll.protocol import S
from eggroll.state import is_key, keys_to_words

SEPARATOR = "\0"  # of the keys to a leaf


def describe(state: S) -> S:
    """Describe a state, so that one like it can be restored while it is gone: keys, numbers and empty arrays stay arrays."""

    def shape_of(leaf: Any) -> Any:
        kept = not isinstance(leaf, jax.Array) or is_key(leaf) or leaf.size <= 1
        return leaf if kept else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    return jax.tree.map(shape_of, state)


def storable(state: S, carried: Any) -> dict[str, Any]:
    """A state and what is carried with it, as orbax takes them."""
    stored = keys_to_words({"state": state._asdict(), "carried": carried})
    # orbax refuses empty arrays
    stored = jax.tree.map(lambda leaf: leaf if np.size(leaf) else np.asarray(np.shape(leaf)), stored)
    if jax.process_count() == 1:
        return stored
    # orbax takes global arrays or NumPy arrays, but not arrays local to one process.
    return jax.tree.map(_local, stored)


def _local(leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return np.empty(leaf.shape, leaf.dtype) if leaf.sharding.is_fully_addressable else leaf
    return np.asarray(leaf) if getattr(leaf, "is_fully_addressable", True) else leaf


def name_of(path: Any) -> str:
    """The keys to a leaf, which are the same whether a node is a mapping or a named tuple."""
    return jax.tree_util.keystr(path, simple=True, separator=SEPARATOR)


def shapes_of(tree: Any) -> dict[str, tuple[Any, Any]]:
    """Shape and dtype of every leaf."""
    return {name_of(path): (leaf.shape, leaf.dtype) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def refill(like: Any, stored: Any) -> Any:
    """What was read, or the empty array whose shape was stored in its place."""
    if np.size(like):
        return stored
    if tuple(stored) != like.shape:
        raise ValueError(f"it has an empty array of shape {tuple(stored)}, expected {like.shape}")
    return like.copy()


def put_like(like: Any, stored: Any) -> Any:
    """What was read, on the devices of `like`."""
    return jax.device_put(stored, like.sharding) if isinstance(like, jax.Array) else stored


def abstract(leaf: Any) -> Any:
    """Target of a restore: with the sharding of `leaf`, or a NumPy array."""
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    return np.empty_like(leaf)
