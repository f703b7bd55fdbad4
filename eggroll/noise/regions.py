"""Regions of a parameter: where a block of an update lies, and the noise that is in it.

A region is a hyper-rectangle of a leaf. Its noise is drawn from the same addresses as the whole leaf's, so any cut of a
parameter into regions sees the same noise; only the words that the region needs are drawn where its values are contiguous.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from eggroll.noise import addresses
from eggroll.noise.addresses import Factors
from eggroll.noise.draws import LeafKeys, from_matrix, leaf_keys
from eggroll.noise.factored import FactoredLeaf, FlipoutLeaf
from eggroll.noise.leaves import DenseLeaf, LeafPlan, PerturbedLeaf
from eggroll.noise.once import computed_once

LIMIT = 4 << 20  # weights of a block
CACHED = 1 << 20  # of a block that the caches of a CPU hold with what is made of it
FEW = 8  # pairs whose sum takes less than reading and writing the weights
ALIGNMENT = 128  # of the rows of a block where they do not divide: tiles of kernels, whole words of packed signs


class Region(NamedTuple):
    """A hyper-rectangle of a leaf."""

    starts: tuple[Array | int, ...]  # int32 scalars, one per axis of the leaf
    sizes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class BlockGrid:
    """Regions of one shape that lie next to each other: `count` of them along every axis, from `first` on."""

    sizes: tuple[int, ...]  # of a block
    count: tuple[int, ...]
    first: tuple[int, ...]

    def __len__(self) -> int:
        return math.prod(self.count)

    def region(self, index: Array | int) -> Region:
        """Return block number `index`, the last axis of the leaf varying fastest."""
        where = [index] if len(self.count) == 1 else jnp.unravel_index(index, self.count) if self.count else []
        starts = [first + size * at for first, size, at in zip(self.first, self.sizes, where, strict=True)]
        return Region(tuple(starts), self.sizes)


def block_limit(num_pairs: int) -> int:
    """Weights of a block of an update; on a CPU with few pairs it is read and looked over several times, in the caches."""
    return min(LIMIT, CACHED) if num_pairs <= FEW and jax.default_backend() == "cpu" else LIMIT


def cut(leaf: LeafPlan, shape: Sequence[int], *, limit: int | None = None) -> list[BlockGrid]:
    """Cut a leaf, or a device's piece of it, into blocks.

    Layers are apart before a layer is cut; of a matrix the longer side is cut, so that noise is drawn again as little as
    possible.

    Args:
        leaf: its plan.
        shape: of the leaf or of the piece.
        limit: weights of a block; None: `LIMIT`.

    Returns:
        One set of blocks, or two: a cut that leaves a remainder.
    """
    limit, sizes, rest = limit or LIMIT, list(shape), math.prod(shape)
    whole = BlockGrid(tuple(shape), (1,) * len(shape), (0,) * len(shape))
    if rest <= limit:
        return [whole]
    for axis in _cut_order(leaf, shape):
        rest //= shape[axis]
        sizes[axis] = 1
        if rest <= limit:
            sizes[axis] = length_of_blocks(shape[axis], limit // rest)
            break
    main = BlockGrid(tuple(sizes), tuple(n // size for n, size in zip(shape, sizes, strict=True)), whole.first)
    left = shape[axis] % sizes[axis]
    if not left:
        return [main]
    narrow, first = list(sizes), list(whole.first)
    narrow[axis], first[axis] = left, shape[axis] - left
    return [main, BlockGrid(tuple(narrow), tuple(1 if k == axis else n for k, n in enumerate(main.count)), tuple(first))]


def _cut_order(leaf: LeafPlan, shape: Sequence[int]) -> list[int]:
    stack, rows, columns = leaf.axes
    if isinstance(leaf, FlipoutLeaf) or not isinstance(leaf, FactoredLeaf):
        return [*stack, *rows, *columns] if rows or columns else list(range(len(shape)))
    longer_first = sorted((rows, columns), key=lambda axes: math.prod(shape[axis] for axis in axes), reverse=True)
    return [*stack, *longer_first[0], *longer_first[1]]


def length_of_blocks(size: int, most: int) -> int:
    """Length of a block along the axis that is cut: one that divides the axis, or an aligned one."""
    count = -(-size // most)
    for parts in range(count, 2 * count + 1):
        if size % parts == 0:
            return size // parts
    return max(1, most // ALIGNMENT * ALIGNMENT or most)


def of_region(leaf: LeafPlan, region: Region) -> LeafPlan:
    """Return the plan of a leaf of the region's shape."""
    return dataclasses.replace(leaf, shape=region.sizes)


def draw_region(leaf: PerturbedLeaf, keys: LeafKeys, pair: Array | int, region: Region) -> Factors | Array:
    """Draw the noise of one pair in a region: what `draws.draw` gives, cut to it.

    Args:
        leaf: the plan of the whole leaf.
        keys: of the leaf, from `draws.leaf_keys`.
        pair: int32 scalar.
        region: of the leaf.

    Returns:
        An array of the region's shape, or its factors, unpacked.
    """
    index = _layer_index(leaf, region)
    own = addresses.layer_keys(keys.own, pair, index)
    if not isinstance(leaf, FactoredLeaf):
        axes = [axis for axis in range(len(leaf.shape)) if axis not in leaf.stack]
        return _draw_part(leaf, own, region, axes, 0, 1).reshape(region.sizes)
    other = own if keys.shared is None else addresses.layer_keys(keys.shared, pair, index)
    left = _draw_part(leaf, own, region, leaf.rows, 0, leaf.rank)
    right = _draw_part(leaf, other, region, leaf.columns, leaf.rank * leaf.matrix[0], leaf.rank)
    return Factors(leaf.rank, left.shape[-1], right.shape[-1], left, right, None)


def cut_factors(leaf: FactoredLeaf, left: Array, right: Array, region: Region) -> tuple[Array, Array]:
    """Cut factors [..., *stack, r, m] and [..., *stack, r, n] of a leaf to a region."""
    layers = [(region.starts[axis], region.sizes[axis]) for axis in leaf.stack]

    def cut_factor(factor: Array, axes: Sequence[int]) -> Array:
        own = factor.reshape(*factor.shape[:-1], *leaf.sizes(axes))
        lead = own.ndim - len(axes) - 1 - len(layers)
        parts = [*layers, (0, own.shape[lead + len(layers)]), *((region.starts[axis], region.sizes[axis]) for axis in axes)]
        starts, sizes = zip(*[(0, size) for size in own.shape[:lead]], *parts, strict=True)
        return jax.lax.dynamic_slice(own, starts, sizes).reshape(*sizes[: own.ndim - len(axes)], -1)

    return cut_factor(left, leaf.rows), cut_factor(right, leaf.columns)


def draw_shared_region(leaf: FlipoutLeaf, key: Array, generation: Array | int, region: Region) -> Array:
    """Draw U of a leaf of role "flipout" in a region, an array of its shape; arguments as for `draws.draw_shared`."""
    dense: DenseLeaf = leaf.shared
    keys = leaf_keys([dense], addresses.stream_key(key, 4), generation)[0]
    own = addresses.layer_keys(keys.own, 0, _layer_index(leaf, region))
    values = _draw_part(dense, own, region, [*leaf.rows, *leaf.columns], 0, 1)
    part = of_region(leaf, region)
    assert isinstance(part, FactoredLeaf)
    return from_matrix(part, values)


def _layer_index(leaf: LeafPlan, region: Region) -> Array:
    """Stack index of every layer of the region: uint32, of the sizes of the stacked axes."""
    sizes, index = leaf.sizes(leaf.stack), jnp.zeros((), jnp.uint32)
    for axis, size in zip(leaf.stack, sizes, strict=True):
        along = jnp.asarray(region.starts[axis]).astype(jnp.uint32) + jnp.arange(region.sizes[axis], dtype=jnp.uint32)
        index = index[..., None] * jnp.uint32(size) + along
    return index


def _draw_part(leaf: PerturbedLeaf, keys: Array, region: Region, axes: Sequence[int], first: int, rank: int) -> Array:
    """Values of `rank` consecutive arrays over `axes`, cut to the region: [*stack, rank, values of the region].

    Args:
        leaf: the plan of the whole leaf.
        keys: uint32 [*stack, 2].
        region: of the leaf.
        axes: of the arrays, in the order of their values.
        first: value of the address that the first array begins with.
        rank: number of arrays.
    """
    sizes, part = leaf.sizes(axes), [region.sizes[axis] for axis in axes]
    starts, size, count = [region.starts[axis] for axis in axes], math.prod(sizes), math.prod(part)
    if size == count:
        return draw_values(leaf, keys, first, rank * size).reshape(*keys.shape[:-1], rank, size)
    if not _is_contiguous(sizes, part):
        whole = draw_values(leaf, keys, first, rank * size).reshape(*keys.shape[:-1], rank, *sizes)
        lead = keys.ndim
        cut_out = jax.lax.dynamic_slice(whole, [*[0] * lead, *starts], [*whole.shape[:lead], *part])
        return cut_out.reshape(*keys.shape[:-1], rank, count)
    begin = jnp.uint32(0)
    for start, length in zip(starts, sizes, strict=True):
        begin = begin * jnp.uint32(length) + jnp.asarray(start).astype(jnp.uint32)
    runs = [draw_values(leaf, keys, jnp.uint32(first + term * size) + begin, count) for term in range(rank)]
    return jnp.stack(runs, axis=-2)


def _is_contiguous(sizes: Sequence[int], part: Sequence[int]) -> bool:
    """Whether a part of an array is one run of its values: single indices, then a range, then whole axes."""
    ranges = [k for k, (size, length) in enumerate(zip(sizes, part, strict=True)) if length not in (1, size)]
    first = ranges[0] if ranges else next((k for k, length in enumerate(part) if length != 1), len(part)) - 1
    return all(length == 1 for length in part[: max(0, first)]) and list(part[first + 1 :]) == list(sizes[first + 1 :])


def draw_values(leaf: PerturbedLeaf, keys: Array, first: Array | int, count: int) -> Array:
    """Values first ... first + count - 1 of every address: [*stack, count]; keys uint32 [*stack, 2]."""
    if leaf.draws_alone:
        index = jnp.asarray(first).astype(jnp.uint32) + jnp.arange(count, dtype=jnp.uint32)
        return computed_once(leaf.decode_values(addresses.words_at(keys[..., None, :], index), count))
    per_word = leaf.values_per_word
    unit, before = 2 * per_word, 0  # a call of the generator makes two words
    if not isinstance(first, int) or first % unit:
        before = unit
    words = -(-(count + before) // per_word)
    if isinstance(first, int):
        aligned = first // unit * unit
        drawn = addresses.draw_words([keys], [words], first=aligned // per_word)[0]
        return leaf.decode_values(drawn, words * per_word)[..., first - aligned : first - aligned + count]
    aligned = first // jnp.uint32(unit) * jnp.uint32(unit)
    drawn = addresses.draw_words([keys], [words], first=aligned // jnp.uint32(per_word))[0]
    values = leaf.decode_values(drawn, words * per_word)
    return jax.lax.dynamic_slice_in_dim(values, (first - aligned).astype(jnp.int32), count, axis=-1)
