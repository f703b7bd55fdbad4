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
from eggroll.noise.once import computed_once, rounded_once
from eggroll.noise.regions import BlockGrid, Region
from eggroll.state import is_key
from eggroll.update.checksums import entry_terms, has_checksum, place_weights, reduce_together, sum_array
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
    checksums: Array  # uint32 [2, arrays], before and after: of the parameter, the master if there is one, the moments


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
    counts = no_counts(rules.leaf, jnp.zeros((2, len(_arrays(held))), jnp.uint32))
    for alike in blocks:
        if len(alike) == 1 and alike.sizes == held.param.shape:
            return _move_block(held, alike.region(0), compute, rules)

        def move_next(index: Array, carry: tuple[Held, Counts], alike: BlockGrid = alike) -> tuple[Held, Counts]:
            held, counts = carry
            region = alike.region(index)
            old = jax.tree.map(lambda x: jax.lax.dynamic_slice(x, region.starts, region.sizes), held)
            old = jax.lax.optimization_barrier(old)  # read once, before it is overwritten; else XLA may copy all of `held`
            if rules.leaf.quantised:
                old = jax.tree.map(computed_once, old)  # on CPU, where that barrier does not stop a conversion of integers
            new, own = _move_block(old, region, compute, rules)
            held = jax.tree.map(lambda x, part: jax.lax.dynamic_update_slice(x, part, region.starts), held, new)
            return held, add_counts(counts, own)

        held, counts = jax.lax.fori_loop(0, len(alike), move_next, (held, counts))
    return held, counts


def no_counts(leaf: LeafPlan, checksums: Array) -> Counts:
    """Counts of a parameter that does not move."""
    zero = jnp.zeros((), jnp.int32 if leaf.integer else jnp.float32)
    return Counts(zero, zero, zero, jnp.zeros(2, jnp.int32), jnp.int32(0), checksums)


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
        added = rounded_once(jnp.clip(added, -LARGEST, LARGEST) if leaf.quantised else added)
        new, master = _store(added, region, param.dtype, rules), None if old.master is None else added
    moments = tuple(rounded_once(new.astype(before.dtype)) for new, before in zip(moves.moments, old.moments, strict=True))
    made = Held(new, master, moments)
    finite, moved, checksums = _look_over(old, made, (added, wide), region, rules)
    stays = ~finite if rules.skipped is None else ~finite | rules.skipped
    made = jax.tree.map(functools.partial(jnp.where, stays), old, made)
    moved, after = jnp.where(stays, 0, moved), jnp.where(stays, *checksums)
    squares = _sum_squares(moves, wide, added, stays, leaf)
    return made, Counts(*squares, moved, (~finite).astype(jnp.int32), jnp.stack([checksums[0], after]))


def _sum_squares(moves: Moves, wide: Array, added: Array, stays: Array, leaf: LeafPlan) -> tuple[Array, Array, Array]:
    """Sums of the squares of the gradient, the update and the new values of a block."""
    if not jnp.issubdtype(moves.gradient.dtype, jnp.floating):
        return jnp.int32(0), jnp.int32(0), jnp.int32(0)
    square = jnp.sum(moves.gradient**2)
    if isinstance(leaf, FrozenLeaf):
        return square, jnp.float32(0), jnp.float32(0)
    step = jnp.where(stays, 0, jnp.sum(moves.update.astype(jnp.float32) ** 2))
    return square, step, jnp.sum(jnp.where(stays, wide, added).astype(jnp.float32) ** 2)


def _store(added: Array, region: Region, dtype: Any, rules: Storing) -> Array:
    if not rules.short or rules.rounding_key is None:
        return store(added, dtype, on_grid=rules.leaf.quantised, words=None)
    starts = [origin + start for origin, start in zip(rules.origin, region.starts, strict=True)]
    words = rounding_words(rules.rounding_key, rules.leaf.shape, starts, region.sizes)
    return store(added, dtype, on_grid=rules.leaf.quantised, words=words)


def _look_over(
    old: Held, made: Held, wide: tuple[Array, Array], region: Region, rules: Storing
) -> tuple[Array, Array, tuple[Array, Array]]:
    """Look over a block in one pass, before it is decided whether the new values are stored.

    Args:
        old: before the update.
        made: what the update made of it.
        wide: the new and old values of the parameter in the precision of the update.
        region: of the block.
        rules: how new values are stored.

    Returns:
        Whether every entry is finite or as it was; how many stored weights differ, two digits int32 [2]; the checksums of `old`
        and `made`, uint32 [arrays].
    """
    conditions: dict[tuple[int, ...], list[Array]] = {}
    for new, before in (wide, *zip(_arrays(made), _arrays(old), strict=True)):
        if jnp.issubdtype(new.dtype, jnp.floating):
            conditions.setdefault(new.shape, []).append(jnp.isfinite(new) | (new == before))
    own, terms = conditions.pop(region.sizes, []), [_terms(held, region, rules) for held in (old, made)]
    counted = jnp.issubdtype(old.param.dtype, jnp.floating) or old.param.dtype == jnp.int8
    changed = [(old.param != made.param).astype(jnp.uint32)] if counted and old.param.size < 2**32 else []
    finite, sums = reduce_together(own, [*terms[0].values(), *terms[1].values(), *changed])
    finite = functools.reduce(jnp.logical_and, [reduce_together(others, [])[0] for others in conditions.values()], finite)
    if changed:
        moved = jnp.stack([sums[-1] // BASE, sums[-1] % BASE]).astype(jnp.int32)
    else:
        moved = _count_by_rows(old.param, made.param) if counted else jnp.zeros(2, jnp.int32)
    before = _join_sums(old, dict(zip(terms[0], sums, strict=False)), rules)
    after = _join_sums(made, dict(zip(terms[1], sums[len(terms[0]) :], strict=False)), rules)
    return finite, moved, (before, after)


def _count_by_rows(old: Array, new: Array) -> Array:
    """Weights that changed in a leaf of 2^32 or more of them, counted by its first axis."""
    changed = jnp.sum(old != new, axis=tuple(range(1, old.ndim)), dtype=jnp.int32).reshape(-1)
    return carry_over(jnp.stack([jnp.sum(changed // BASE), jnp.sum(changed % BASE)]))


def sum_held(held: Held, rules: Storing) -> Array:
    """Return the checksums of a parameter that stays as it is, before and after: uint32 [2, arrays]."""
    sums = _join_sums(held, {}, rules)
    return jnp.stack([sums, sums])


def _arrays(held: Held) -> list[Array]:
    return jax.tree.leaves(held)


def _terms(held: Held, region: Region, rules: Storing) -> dict[int, Array]:
    """What the entries of a block add to the checksums of those arrays that are cut as the parameter is."""
    starts = [origin + start for origin, start in zip(rules.origin, region.starts, strict=True)]
    weights = place_weights(rules.leaf.shape, starts, region.sizes)
    alike = {k: array for k, array in enumerate(_arrays(held)) if array.shape == region.sizes and not is_key(array)}
    return {k: entry_terms(array, weights) for k, array in alike.items()}


def _join_sums(held: Held, known: dict[int, Array], rules: Storing) -> Array:
    """The checksums of all arrays, uint32 [arrays]."""
    shape = held.param.shape
    known = known if has_checksum(rules.leaf) else known | {0: jnp.uint32(0)}

    def of_array(array: Array) -> Array:
        return sum_array(array, shape=rules.leaf.shape, starts=rules.origin) if array.shape == shape else sum_array(array)

    return jnp.stack([known[k] if k in known else of_array(array) for k, array in enumerate(_arrays(held))])
