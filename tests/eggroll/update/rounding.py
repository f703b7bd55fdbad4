"""Adds given updates to parameters as a generation does: one parameter, one block, its rounding."""

import jax

from eggroll.noise.leaves import FrozenLeaf
from eggroll.noise.regions import cut
from eggroll.noise.rules import LowRank
from eggroll.update.blocks import Held, Moves, Storing, move
from eggroll.update.precision import are_short


def apply_updates(params, masters, updates, *, precision, key, quantised=None):
    """Return the new (params, masters)."""
    leaves, tree = jax.tree.flatten(params)
    new = []
    for leaf, master, step, short, on_grid in zip(
        leaves, masters, jax.tree.leaves(updates), are_short(leaves, quantised), quantised or [False] * len(leaves), strict=True
    ):
        plan = FrozenLeaf("w", leaf.shape, leaf.dtype, LowRank(), "", step.dtype if on_grid else None)
        rules = Storing(plan, short, key if precision == "stochastic" else None, None, (0,) * leaf.ndim)
        moves = Moves(step, step, ())
        new.append(move(Held(leaf, master, ()), cut(plan, leaf.shape), lambda region, old, moves=moves: moves, rules)[0])
    return jax.tree.unflatten(tree, [held.param for held in new]), tuple(held.master for held in new)
