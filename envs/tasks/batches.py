"""The order of the data: each problem once per epoch, in a new order, computed from the step number alone.

Position p = step * batch_size + b is entry p mod n of the order of epoch p div n, a permutation drawn from [seed, epoch].
Nothing is dropped: a batch may span two epochs, and then have a problem twice.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from eggroll.envs.tasks.protocol import Row


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """Rows in batches; `batches(step)` is a pure function, so that a resumed run only needs the step.

    Args:
        rows: the n problems.
        batch_size: from 1 to n.
        seed: of the order, at least 0.

    Raises:
        ValueError: `batch_size` is out of its bounds.
    """

    rows: Sequence[Row]
    _: dataclasses.KW_ONLY
    batch_size: int
    seed: int = 0

    def __post_init__(self):
        if not 1 <= self.batch_size <= len(self.rows):
            raise ValueError(f"batch_size must be between 1 and the {len(self.rows)} rows, got {self.batch_size}.")

    def __call__(self, step: int) -> list[Row]:
        """Return the batch of a step, numbered from 0."""
        return [self.rows[index] for index in self.indices(step)]

    def indices(self, step: int) -> list[int]:
        """Return the indices of the rows in the batch of a step."""
        n = len(self.rows)
        first = step * self.batch_size
        return [int(_order(self.seed, position // n, n)[position % n]) for position in range(first, first + self.batch_size)]


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)
