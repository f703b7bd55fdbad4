"""Draws the noise of planned leaves from their addresses, the fresh and the shared part of it."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from eggroll.noise import addresses
from eggroll.noise.addresses import Factors
from eggroll.noise.factored import FactoredLeaf, FlipoutLeaf
from eggroll.noise.leaves import LeafPlan, PerturbedLeaf
from eggroll.noise.once import computed_once
from eggroll.noise.plan import Plan


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
    own = addresses.leaf_keys(key, generation, [leaf.path for leaf in leaves])
    shared: dict[str, Array] = {}
    for refresh in sorted({leaf.refresh for leaf in leaves} - {1}):
        lazy = [leaf.path for leaf in leaves if leaf.refresh == refresh]
        shared |= zip(lazy, addresses.leaf_keys(addresses.stream_key(key, 3), generation // refresh, lazy), strict=True)
    return [LeafKeys(mine, shared.get(leaf.path)) for leaf, mine in zip(leaves, own, strict=True)]


def draw(
    leaves: Sequence[PerturbedLeaf],
    keys: Sequence[LeafKeys],
    pair: Array | int,
    *,
    first_index: Array | int = 0,
    first_word: Array | int = 0,
) -> list[Factors | Array]:
    """Draw the noise of one pair for several leaves that are not frozen.

    Args:
        leaves: their plans.
        keys: of every leaf, from `leaf_keys`.
        pair: int32 scalar.
        first_index: stack index of the first layer of every leaf (`addresses.address_keys`).
        first_word: of the words at every address, even; not 0 where the leaves are parts of dense ones.

    Returns:
        What `PerturbedLeaf.decode` gives, per leaf.
    """
    words = _draw_words(leaves, [key.own for key in keys], pair, first_index, first_word)
    drawn = [leaf.decode(own) for leaf, own in zip(leaves, words, strict=True)]
    lazy = {index: key.shared for index, key in enumerate(keys) if key.shared is not None}
    others = _draw_words([leaves[index] for index in lazy], list(lazy.values()), pair, first_index, first_word)
    for index, other in zip(lazy, others, strict=True):
        left, right = drawn[index], leaves[index].decode(other)
        assert isinstance(left, Factors) and isinstance(right, Factors)
        drawn[index] = addresses.join_factors(left, right, leaves[index].noise_dtype)
    return drawn


def _draw_words(
    leaves: Sequence[PerturbedLeaf],
    keys: Sequence[Array],
    pair: Array | int,
    first_index: Array | int,
    first_word: Array | int,
) -> list[Array]:
    if not leaves:
        return []
    layers = addresses.address_keys(keys, pair, [leaf.sizes(leaf.stack) for leaf in leaves], first_index=first_index)
    together = [place for place, leaf in enumerate(leaves) if not leaf.draws_alone]
    parts = [layers[place] for place in together], [leaves[place].words for place in together]
    words = dict(zip(together, addresses.draw_words(*parts, first=first_word) if together else [], strict=True))
    for place, leaf in enumerate(leaves):
        if place not in words:
            index = jnp.asarray(first_word).astype(jnp.uint32) + jnp.arange(leaf.words, dtype=jnp.uint32)
            words[place] = addresses.words_at(layers[place][..., None, :], index)
    return [words[place] for place in range(len(leaves))]


class Flipped(NamedTuple):
    """Noise of one pair for a leaf of role "flipout": U o (r s^T)."""

    shared: Array  # U, of the leaf's shape and dtype
    signs: Factors  # r and s


class Undrawn(NamedTuple):
    """Dense noise of one pair that is drawn where a member reads the parameter."""

    keys: Array  # uint32 [*stack, 2], of its addresses


Drawn = Factors | Flipped | Undrawn | Array  # noise of one pair for a leaf


def build_noise(planned: FactoredLeaf, drawn: Factors | Flipped) -> Array:
    """sqrt(r) E of one leaf, built: left^T right in the leaf's own axis order, times what is shared."""
    if isinstance(drawn, Flipped):
        return drawn.shared * build_noise(planned, drawn.signs)
    left, right = map(computed_once, drawn.unpack(planned.noise_dtype))
    return from_matrix(planned, jnp.einsum("...rm,...rn->...mn", left, right))


def from_matrix(planned: FactoredLeaf, matrix: Array) -> Array:
    """Arrange [*stack, m, n], in any shape, as the leaf."""
    axes = [*planned.stack, *planned.rows, *planned.columns]
    return matrix.reshape(planned.sizes(axes)).transpose([axes.index(axis) for axis in range(len(axes))])


def draw_shared(plan: Plan, key: Array, generation: Array | int, *, first_index: Array | int = 0) -> list[Array | None]:
    """Noise that all pairs share, at the address of pair 0 under its own key: U of leaves of role "flipout", else None."""
    leaves = [leaf for leaf in plan.leaves if isinstance(leaf, FlipoutLeaf)]
    if not leaves:
        return [None] * len(plan.leaves)
    dense = [leaf.shared for leaf in leaves]
    keys = [own.own for own in leaf_keys(dense, addresses.stream_key(key, 4), generation)]
    words = _draw_words(dense, keys, 0, first_index, 0)
    drawn = [leaf.decode(own) for leaf, own in zip(dense, words, strict=True)]
    arranged = iter([from_matrix(leaf, own) for leaf, own in zip(leaves, drawn, strict=True)])
    return [next(arranged) if isinstance(leaf, FlipoutLeaf) else None for leaf in plan.leaves]


def draw_pair(
    plan: Plan,
    key: Array,
    generation: Array | int,
    pair: Array | int,
    *,
    first_index: Array | int = 0,
    shared: list[Array | None] | None = None,
    late: bool = False,
) -> list[Drawn | None]:
    """Noise of one pair for every leaf, None where frozen; `generation` is divided by `noise_reuse` already.

    `first_index` is the stack index of the first layer, not 0 where the plan is of one layer out of a stack. `shared` is from
    `draw_shared`, for a caller that draws it once for several chunks of pairs. With `late`, leaves that are so are `Undrawn`.
    """
    shared = draw_shared(plan, key, generation, first_index=first_index) if shared is None else shared
    perturbed = [leaf for leaf in plan.leaves if isinstance(leaf, PerturbedLeaf)]
    keys = dict(zip((leaf.path for leaf in perturbed), leaf_keys(perturbed, key, generation), strict=True))
    at_once, undrawn = ([leaf for leaf in perturbed if (late and leaf.is_late) is chosen] for chosen in (False, True))
    drawn: list[Drawn] = [*draw(at_once, [keys[leaf.path] for leaf in at_once], pair, first_index=first_index)]
    if undrawn:
        about = [keys[leaf.path].own for leaf in undrawn], pair, [leaf.sizes(leaf.stack) for leaf in undrawn]
        drawn += map(Undrawn, addresses.address_keys(*about, first_index=first_index))
    own = dict(zip((leaf.path for leaf in (*at_once, *undrawn)), drawn, strict=True))
    found = [own.get(leaf.path) for leaf in plan.leaves]
    return [
        Flipped(u, signs) if u is not None and isinstance(signs, Factors) else signs
        for u, signs in zip(shared, found, strict=True)
    ]
