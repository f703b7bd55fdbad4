"""Checksums of a state: one word per array, from which a changed array is named.

    checksum = sum over the entries i of (w_i xor w_i >> 16) k_i  mod 2^32        w_i: the bits of entry i
    k_i      = (m xor m >> 16) | 1,  m = 0x9E3779B9 i                             i: its place in the whole array

Sums of integers do not depend on their order: the checksum is the same in blocks, in pieces over devices, and for any number of
them. One changed entry of at most 32 bits always changes it, any other change with a probability of about 1 - 2^-32: two
entries that are swapped and a factor of all entries among them, which a plain sum of words would miss. A wider entry has
several words, of which word j has the weight (2 j + 1) k_i.

The arrays, in this order: parameters, entries of the optimizer's state, masters, the key. Collections that are not parameters
have the checksum 0.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from eggroll.noise.leaves import FrozenLeaf, LeafPlan
from eggroll.noise.plan import Plan
from eggroll.state import ESState, is_key

_STEP = 0x9E3779B9  # of m
_SHOWN = 5  # arrays that an error names


class OtherState(ValueError):
    """A state does not have the checksums that were recorded of it."""

    def __init__(self, names: Sequence[str]):
        super().__init__(f"other values than were recorded: {list_names(names)}.")
        self.names = list(names)  # of the arrays


def checksum_names(state: ESState) -> list[str]:
    """Return the names of the arrays that have a checksum, in order, such as `params/w` or `opt_state/0/mu/w`."""
    params = names_of("", state.params)
    masters = [f"masters{name}" for name, own in zip(params, state.masters, strict=True) if own is not None]
    return [*(f"params{name}" for name in params), *names_of("opt_state", state.opt_state), *masters, "key"]


def names_of(part: str, tree: Any) -> list[str]:
    """Return the names of the leaves of a part of a state: the part, and the path behind a slash."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return ["/".join((part, *(jax.tree_util.keystr((key,), simple=True) for key in path))) for path, _ in leaves]


def has_checksum(leaf: LeafPlan) -> bool:
    """Whether a parameter is compared: collections, such as the statistics of BatchNorm, are the user's to replace."""
    return not (isinstance(leaf, FrozenLeaf) and leaf.collection)


def sum_state(plan: Plan, state: ESState) -> Array:
    """Return the checksums of a state, uint32 [arrays]; one pass over it."""
    params = zip(plan.leaves, jax.tree.leaves(state.params), strict=True)
    others = (*jax.tree.leaves((state.opt_state, state.masters)), state.key)
    own = [sum_array(array) if has_checksum(leaf) else jnp.uint32(0) for leaf, array in params]
    return jnp.stack([*own, *map(sum_array, others)])


def sum_array(array: Array, *, shape: Sequence[int] | None = None, starts: Sequence[Array | int] | None = None) -> Array:
    """Return the checksum of an array, or what a piece of it adds to that; uint32 [].

    Args:
        array: of any dtype.
        shape: of the whole array; None: it is whole.
        starts: where the piece begins.
    """
    data = jax.random.key_data(array) if is_key(array) else array
    whole = data.shape if shape is None or is_key(array) else tuple(shape)
    weights = place_weights(whole, starts or (0,) * data.ndim, data.shape)
    terms = entry_terms(data, weights)
    odd = (weights >> 1) & 1 == 1  # two sums, which XLA for CPU forms in one pass; the operand of a lone one it stores
    zero = jnp.uint32(0)
    _, sums = reduce_together([], [jnp.where(odd, terms, zero), jnp.where(odd, zero, terms)])
    return sums[0] + sums[1]


def place_weights(shape: Sequence[int], starts: Sequence[Array | int], sizes: Sequence[int]) -> Array:
    """Return k of the entries of a region of an array, uint32 of `sizes`.

    Args:
        shape: of the whole array.
        starts: where the region begins.
        sizes: of the region.
    """
    place, stride = jnp.zeros(tuple(sizes), jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        along = jnp.asarray(starts[axis]).astype(jnp.uint32) + lax.broadcasted_iota(jnp.uint32, tuple(sizes), axis)
        place, stride = place + along * jnp.uint32(stride % 2**32), stride * shape[axis]
    place = place * jnp.uint32(_STEP)
    return (place ^ (place >> 16)) | jnp.uint32(1)


def entry_terms(array: Array, weights: Array) -> Array:
    """Return what every entry adds to the checksum: uint32, like the weights."""
    terms = jnp.zeros((), jnp.uint32)
    for index, word in enumerate(_words(array)):
        terms = terms + (word ^ (word >> 16)) * (weights if index == 0 else weights * jnp.uint32(2 * index + 1))
    return terms


def _words(array: Array) -> list[Array]:
    """The bits of every entry as words: one, or several where an entry has more than 32 bits."""
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        return [*_words(array.real), *_words(array.imag)]
    if array.dtype == jnp.bool_:
        return [array.astype(jnp.uint32)]
    if array.dtype.itemsize > 4:
        return [*jnp.moveaxis(lax.bitcast_convert_type(array, jnp.uint32), -1, 0)]
    bits = (jnp.iinfo if jnp.issubdtype(array.dtype, jnp.integer) else jnp.finfo)(array.dtype).bits
    return [lax.bitcast_convert_type(array, f"uint{bits}").astype(jnp.uint32)]


def reduce_together(conditions: Sequence[Array], summands: Sequence[Array]) -> tuple[Array, list[Array]]:
    """Reduce arrays of one shape in one pass: whether all conditions hold everywhere, and the sum of each summand, uint32.

    It is one reduction of several operands, all of one dtype: XLA for CPU writes the operand of a lone reduction to memory, and
    vectorises no other.
    """
    violated = [(~functools.reduce(jnp.logical_and, conditions)).astype(jnp.uint32)] if conditions else []
    operands = [*violated, *summands]
    if not operands:
        return jnp.bool_(True), []
    count = lax.add if operands[0].size < 2**32 else lax.bitwise_or  # a sum could wrap around to 0
    joins = [count] * len(violated) + [lax.add] * len(summands)

    def join(one: Sequence[Array], other: Sequence[Array]) -> list[Array]:
        return [own(a, b) for own, a, b in zip(joins, one, other, strict=True)]

    found = lax.reduce(operands, [jnp.uint32(0)] * len(operands), join, tuple(range(operands[0].ndim)))
    return (found[0] == 0 if violated else jnp.bool_(True)), list(found[len(violated) :])


def compare(names: Sequence[str], recorded: Any, found: Any) -> None:
    """Compare two lists of checksums, uint32 [arrays]; OtherState names the arrays where they differ."""
    recorded, found = np.asarray(recorded), np.asarray(found)
    if recorded.shape != found.shape:
        raise ValueError(f"{recorded.size} checksums were recorded, of a state that has {found.size} arrays.")
    if (recorded != found).any():
        raise OtherState([name for name, differs in zip(names, recorded != found, strict=True) if differs])


def list_names(names: Sequence[str]) -> str:
    """Name arrays in an error, the first few of many."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
