"""Moves one parameter, block by block and in place: gradient, optimizer, rounding, and the check of what is stored.

    for every block: g = sum over the pairs;  u, moments = optimizer(-g, w, moments);  w + u rounded to the stored dtype

Only one block's gradient, random bits and new values exist at a time. A block whose new values or moments are not finite keeps
its old ones: no NaN or infinity is stored that was not there before.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from eggroll.noise.integer import LARGEST
from eggroll.noise.leaves import FrozenLeaf, LeafPlan
from eggroll.noise.regions import BlockGrid, Region
from eggroll.update.precision import rounding_words, store

BASE = 1 << 24  # of the two digits that weights are counted in


class Held(NamedTuple):
    """What a run keeps of one parameter, or of a block of it."""

    param: Array
    master: Array | None  # float32
    moments: tuple[Array, ...]  # entries of the optimizer's state


class Counts(NamedTuple):
    """What happened to a parameter."""

    squares: Array  # float32 [], sum of the squares of the gradient; int32 0 for int8 parameters, as the two that follow
    steps: Array  # float32 [], sum of the squares of the update
    weights: Array  # float32 [], sum of the squares of the new values
    moved: Array  # int32 [2], stored weights that changed: in units of `BASE`, and the rest
    kept: Array  # int32 [], blocks that kept their old values, the new ones not being finite


class Moves(NamedTuple):
    """The gradient and the optimizer's results of a block."""

    gradient: Array  # ascent
    update: Array
    moments: Sequence[Array]


class Storing(NamedTuple):
    """How the new values of a parameter are stored."""

    leaf: LeafPlan
    short: bool  # stored in fewer bits than updated in
    rounding_key: Array | None  # typed threefry key; None: round to nearest
    skipped: Array | None  # bool [], nothing changes; None: never
    origin: tuple[Array | int, ...]  # where a device's piece of the parameter begins


def move(
    held: Held, blocks: Sequence[BlockGrid], compute: Callable[[Region, Held], Moves], rules: Storing
) -> tuple[Held, Counts]:
    """Update a parameter.

    Args:
        held: the parameter, or a device's piece of it.
        blocks: its blocks, from `regions.cut`.
        compute: from the region of a block (in `held`) and its wide values to what moves it.
        rules: how new values are stored.

    Returns:
        The new values, and counts.
    """
    counts = no_counts(rules.leaf)
    for alike in blocks:
        if len(alike) == 1 and alike.sizes == held.param.shape:
            return _move_block(held, alike.region(0), compute, rules)

        def move_next(index: Array, carry: tuple[Held, Counts], alike: BlockGrid = alike) -> tuple[Held, Counts]:
            held, counts = carry
            region = alike.region(index)
            old = jax.tree.map(lambda x: jax.lax.dynamic_slice(x, region.starts, region.sizes), held)
            old = jax.lax.optimization_barrier(old)  # read once, before it is overwritten; else XLA may copy all of `held`
            new, own = _move_block(old, region, compute, rules)
            held = jax.tree.map(lambda x, part: jax.lax.dynamic_update_slice(x, part, region.starts), held, new)
            return held, add_counts(counts, own)

        held, counts = jax.lax.fori_loop(0, len(alike), move_next, (held, counts))
    return held, counts


def no_counts(leaf: LeafPlan) -> Counts:
    """Counts of nothing."""
    zero = jnp.zeros((), jnp.int32 if leaf.integer else jnp.float32)
    return Counts(zero, zero, zero, jnp.zeros(2, jnp.int32), jnp.int32(0))


def add_counts(a: Counts, b: Counts) -> Counts:
    """The counts of two parts together."""
    return jax.tree.map(jnp.add, a, b)._replace(moved=carry_over(a.moved + b.moved))


def carry_over(moved: Array) -> Array:
    """Two digits int32 [2], the lower one below `BASE` again."""
    return jnp.stack([moved[0] + moved[1] // BASE, moved[1] % BASE])


def _move_block(old: Held, region: Region, compute: Callable, rules: Storing) -> tuple[Held, Counts]:
    param, leaf = old.param, rules.leaf
    wide = old.master if old.master is not None else param.astype(jnp.float32) if rules.short else param
    moves = compute(region, old._replace(param=wide))
    master, added = None, wide
    if leaf.integer:
        if moves.update.dtype != jnp.int8:
            raise TypeError(
                f"optimizer must be eggroll.threshold(...) for int8 parameters, got steps of dtype {moves.update.dtype}."
            )
        new = param + moves.update
    elif not jnp.issubdtype(wide.dtype, jnp.floating):
        new = param  # frozen integers and keys stay
    else:
        added = wide + moves.update.astype(wide.dtype)
        added = jnp.clip(added, -LARGEST, LARGEST) if leaf.quantised else added
        new, master = _store(added, region, param.dtype, rules), None if old.master is None else added
    moments = tuple(new.astype(before.dtype) for new, before in zip(moves.moments, old.moments, strict=True))
    made = Held(new, master, moments)
    finite = _are_finite([(added, wide), *zip(jax.tree.leaves(made), jax.tree.leaves(old), strict=True)])
    stays = ~finite if rules.skipped is None else ~finite | rules.skipped
    made = jax.tree.map(functools.partial(jnp.where, stays), old, made)
    squares = _sum_squares(moves, wide, added, stays, leaf)
    return made, Counts(*squares, _count_moved(param, made.param), (~finite).astype(jnp.int32))


def _sum_squares(moves: Moves, wide: Array, added: Array, stays: Array, leaf: LeafPlan) -> tuple[Array, Array, Array]:
    """Sums of the squares of the gradient, the update and the new values of a block."""
    if not jnp.issubdtype(moves.gradient.dtype, jnp.floating):
        return jnp.int32(0), jnp.int32(0), jnp.int32(0)
    square = jnp.sum(moves.gradient**2)
    if isinstance(leaf, FrozenLeaf):
        return square, jnp.float32(0), jnp.float32(0)
    step = jnp.sum(jnp.where(stays, 0, moves.update.astype(jnp.float32)) ** 2)
    return square, step, jnp.sum(jnp.where(stays, wide, added).astype(jnp.float32) ** 2)


def _store(added: Array, region: Region, dtype: Any, rules: Storing) -> Array:
    if not rules.short or rules.rounding_key is None:
        return store(added, dtype, on_grid=rules.leaf.quantised, words=None)
    starts = [origin + start for origin, start in zip(rules.origin, region.starts, strict=True)]
    words = rounding_words(rules.rounding_key, rules.leaf.shape, starts, region.sizes)
    return store(added, dtype, on_grid=rules.leaf.quantised, words=words)


def _are_finite(changes: Sequence[tuple[Array, Array]]) -> Array:
    """Whether every entry (new, old) is finite or as it was: one pass over arrays of the same shape."""
    shapes: dict[tuple[int, ...], Array] = {}
    for new, old in changes:
        if jnp.issubdtype(new.dtype, jnp.floating):
            finite = jnp.isfinite(new) | (new == old)
            shapes[new.shape] = shapes[new.shape] & finite if new.shape in shapes else finite
    return functools.reduce(jnp.logical_and, [finite.all() for finite in shapes.values()], jnp.bool_(True))


def _count_moved(old: Array, new: Array) -> Array:
    """Weights that changed: two digits, int32 [2]. Whole leaves of 2^31 weights or more are counted by their first axis."""
    if not (jnp.issubdtype(old.dtype, jnp.floating) or old.dtype == jnp.int8):
        return jnp.zeros(2, jnp.int32)
    if old.size < 2**31:
        count = jnp.sum(old != new, dtype=jnp.int32)
        return jnp.stack([count // BASE, count % BASE])
    changed = jnp.sum(old != new, axis=tuple(range(1, old.ndim)), dtype=jnp.int32).reshape(-1)
    return carry_over(jnp.stack([jnp.sum(changed // BASE), jnp.sum(changed % BASE)]))
