"""The rows of a population [P, R, m] in groups of 64, one group to a warpgroup.

Rows of a pair are padded to a power of two up to 64 or to a multiple of 128, pairs to a multiple of 128 rows in all. A group
holds 64 / R pairs, or a part of one pair, and its noise has `terms` terms: r for each of its pairs, padded to a power of
two up to 128 or to a multiple of 128.
"""

import dataclasses

import jax.numpy as jnp
from jax import Array

from eggroll.kernels import hopper

CHUNK = 128  # terms that a kernel handles at once


@dataclasses.dataclass(frozen=True)
class Groups:
    """The sizes after padding: of the rows of a pair, of the pairs, and of the terms of a group."""

    pairs: int  # after padding
    rows: int  # of one pair, after padding
    rank: int
    terms: int  # of one group, after padding

    @property
    def count(self) -> int:
        """Groups."""
        return self.pairs * self.rows // hopper.ROWS

    @property
    def pairs_of_one(self) -> int:
        """Pairs in one group, 1 where a pair has more rows than a group."""
        return max(1, hopper.ROWS // self.rows)

    @property
    def share_pair(self) -> bool:
        """Whether the two groups of a program belong to one pair."""
        return self.rows > hopper.ROWS

    @classmethod
    def of(cls, pairs: int, rows: int, rank: int, *, least_terms: int) -> "Groups":
        """The smallest padding."""
        if rows > hopper.ROWS:
            return cls(pairs, -(-rows // 128) * 128, rank, max(least_terms, _power_of_two(rank)))
        rows = _power_of_two(rows)
        per_program = 128 // rows
        terms = hopper.ROWS // rows * rank
        terms = max(least_terms, _power_of_two(terms)) if terms <= CHUNK else -(-terms // CHUNK) * CHUNK
        return cls(-(-pairs // per_program) * per_program, rows, rank, terms)

    def pad_pairs(self, array: Array) -> Array:
        """[P, ...] with zeros for the pairs that are padding."""
        return _pad(array, 0, self.pairs)

    def pad_rows(self, array: Array) -> Array:
        """[P, R, ...] with zeros for the pairs and rows that are padding."""
        return _pad(_pad(array, 0, self.pairs), 1, self.rows)

    def by_group(self, array: Array) -> Array:
        """[P, r, ...] -> [F, terms, ...], P padded: F is the number of groups, or P where a pair has several groups."""
        return _pad(array.reshape(-1, self.pairs_of_one * self.rank, *array.shape[2:]), 1, self.terms)


def _power_of_two(size: int) -> int:
    """The least one that is not smaller."""
    return 1 << (size - 1).bit_length()


def _pad(array: Array, axis: int, size: int) -> Array:
    widths = [(0, size - length if at == axis else 0) for at, length in enumerate(array.shape)]
    return jnp.pad(array, widths)
