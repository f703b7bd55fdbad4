"""`ESState`: everything a run needs to continue, and who owns its memory.

A state shares no memory with the caller, and a generation updates it in place: what was a state before a `step`, `tell` or
`replay` is *consumed* by it. `copy_state` keeps a copy.
"""

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

T = TypeVar("T")

Masters = tuple[Array | None, ...]  # float32 copies of short parameters, in leaf order


class ESState(NamedTuple):
    """State of a run: a pytree that jits, scans and saves as it is."""

    params: Any  # the user's pytree, in its storage dtypes
    opt_state: Any  # of the optax transformation, float32
    key: Array  # typed threefry key of the run, never changes
    generation: Array  # int32 []
    sigma: Array  # float32 [], standard deviation of the next generation
    masters: Masters  # float32 copies of low-precision parameters, or None
    member_state: Any  # [P, 2, ...] carried per member, or None


def copy_state(tree: T) -> T:
    """Copy every array of a state, or of any pytree, so that it outlives the generations that consume the original."""
    return jax.tree.map(_copy, tree)


def unshare(tree: T) -> T:
    """Copy keys, and those arrays of a pytree that share their memory with an array before them or are given twice."""
    seen: set[int] = set()

    def take(leaf: Any) -> Any:
        if isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, Array):
            return leaf
        places = _places(leaf)
        shared = bool(places & seen) or is_key(leaf)
        leaf = _copy(leaf) if shared else leaf
        seen.update(_places(leaf) if shared else places)
        return leaf

    return jax.tree.map(take, tree)


def begin(state: T) -> T:
    """Return the state that a generation begins with: its sigma, which a user may set to a number, is an array.

    A number would be another program. Raises as `check_state`.
    """
    check_state(state)
    given: Any = state
    return given._replace(sigma=jnp.asarray(given.sigma, jnp.float32))


def check_state(state: Any) -> None:
    """Check that a state, or shapes of one, can be used: TypeError for another type, ValueError for one that was consumed."""
    if not isinstance(state, ESState):
        raise TypeError(f"state must be an ESState from init, got {type(state).__name__}.")
    check_not_consumed(state)


def check_not_consumed(state: Any) -> None:
    """Raise ValueError when arrays of a state were reused by the generation that followed it, or deleted by the caller."""
    if any(
        isinstance(leaf, Array) and not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted()
        for leaf in jax.tree.leaves(state)
    ):
        raise ValueError(
            "the state was consumed: step, tell and replay reuse the memory of the state that they are given. Use the state "
            "that they return, or copy the old one before: eggroll.copy_state(state). With init(..., donate=True) the "
            "parameters given to init are consumed, too."
        )


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of typed keys."""
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def keys_to_words(tree: T) -> T:
    """Replace typed keys, which files and NumPy do not take, by their words, uint32 [..., words]."""
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, tree)


def words_to_keys(tree: T, like: Any) -> T:
    """Undo `keys_to_words`, with the implementations of the keys in `like`."""

    def restore(leaf: Any, own: Any) -> Any:
        return jax.random.wrap_key_data(jnp.asarray(leaf), impl=jax.random.key_impl(own)) if is_key(own) else leaf

    return jax.tree.map(restore, tree, like)


def _copy(leaf: Any) -> Any:
    if is_key(leaf):
        return jax.random.wrap_key_data(jnp.array(jax.random.key_data(leaf), copy=True), impl=jax.random.key_impl(leaf))
    return jnp.array(leaf, copy=True)


def _places(leaf: Array) -> set[int]:
    """Addresses of the memory of an array on the devices of this process."""
    if leaf.size == 0 or is_key(leaf):
        return set()
    return {shard.data.unsafe_buffer_pointer() for shard in leaf.addressable_shards}
