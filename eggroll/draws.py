"""Draws the noise of planned leaves from their addresses, the fresh and the shared part of it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jax import Array

from eggroll import noise
from eggroll.plan import LeafPlan


class LeafKeys(NamedTuple):
    """Keys of one leaf in one generation."""

    own: Array  # uint32 [2]
    shared: Array | None  # uint32 [2], of a right factor that `spec.refresh` generations share


def leaf_keys(leaves: Sequence[LeafPlan], key: Array, generation: Array | int) -> list[LeafKeys]:
    """Derive the keys of several leaves.

    Args:
        leaves: their plans.
        key: the run's typed threefry key.
        generation: int32 scalar, already divided by `noise_reuse`.
    """
    own = noise.leaf_keys(key, generation, [leaf.path for leaf in leaves])
    shared: dict[str, Array] = {}
    for refresh in sorted({leaf.refresh for leaf in leaves} - {1}):
        lazy = [leaf.path for leaf in leaves if leaf.refresh == refresh]
        shared |= zip(lazy, noise.leaf_keys(noise.stream_key(key, 3), generation // refresh, lazy), strict=True)
    return [LeafKeys(mine, shared.get(leaf.path)) for leaf, mine in zip(leaves, own, strict=True)]


def draw(
    leaves: Sequence[LeafPlan],
    keys: Sequence[LeafKeys],
    pair: Array | int,
    *,
    first_index: Array | int = 0,
    first_word: Array | int = 0,
) -> list[noise.Factors | Array]:
    """Draw the noise of one pair for several leaves that are not frozen.

    Args:
        leaves: their plans.
        keys: of every leaf, from `leaf_keys`.
        pair: int32 scalar.
        first_index: stack index of the first layer of every leaf (`noise.address_keys`).
        first_word: of the words at every address, even; not 0 where the leaves are parts of dense ones.

    Returns:
        What `LeafPlan.decode` gives, per leaf.
    """
    drawn = _drawn(leaves, [key.own for key in keys], pair, first_index, first_word)
    lazy = [index for index, key in enumerate(keys) if key.shared is not None]
    others = _drawn([leaves[i] for i in lazy], [keys[i].shared for i in lazy], pair, first_index, first_word)
    for index, other in zip(lazy, others, strict=True):
        drawn[index] = noise.joined(drawn[index], other, leaves[index].noise_dtype)
    return drawn


def _drawn(
    leaves: Sequence[LeafPlan], keys: Sequence[Any], pair: Array | int, first_index: Array | int, first_word: Array | int
) -> list[Any]:
    if not leaves:
        return []
    addresses = noise.address_keys(keys, pair, [leaf.sizes(leaf.stack) for leaf in leaves], first_index=first_index)
    words = noise.draw_words(addresses, [leaf.words for leaf in leaves], first=first_word)
    return [leaf.decode(own) for leaf, own in zip(leaves, words, strict=True)]
