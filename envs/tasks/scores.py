"""What a batch of completions scored, and the mean in place of scores that are not there."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

MINIMUM = 0.0  # score of a completion whose reward failed, if no other of the batch is lower


class Scores(NamedTuple):
    """Scores of a batch."""

    values: np.ndarray  # float64 [completions], finite
    has_score: np.ndarray  # bool [completions], False where the reward abstained and the value is the mean of the prompt
    failed: np.ndarray  # bool [completions], True where it raised, killed its process or gave no finite number
    timed_out: np.ndarray  # bool [completions], True where it exceeded the time limit
    first_error: str | None = None  # description of the first of either
    minimum: float = MINIMUM  # their score: the scorer's minimum, or the lowest score of the batch if that is lower

    @property
    def errors(self) -> int:
        """The number of completions whose reward raised, killed its process or gave no finite number."""
        return int(self.failed.sum())

    @property
    def timeouts(self) -> int:
        """The number of completions whose reward exceeded the time limit."""
        return int(self.timed_out.sum())

    @property
    def abstained(self) -> int:
        """The number of completions from which the reward abstained."""
        return int((~self.has_score).sum())

    def part(self, items: slice) -> "Scores":
        """Return the scores of some completions, with the first error and the minimum of the batch."""
        parts: Any = {name: array[items] for name, array in self._asdict().items() if isinstance(array, np.ndarray)}
        return self._replace(**parts)


def fill_with_mean(values: np.ndarray, keys: Sequence[Any]) -> np.ndarray:
    """Replace NaN by the mean of the other values with the same key; without one by the mean of all, or by 0.

    Args:
        values: float64 [n].
        keys: one per value, such as prompts, compared as texts.

    Returns:
        float64 [n]; the mean of equal values is exactly that value, so that they stay without signal.
    """
    known, names = ~np.isnan(values), np.array([str(key) for key in keys], object)
    filled = values.copy()
    for name in set(names[~known]):
        same = names == name
        others = values[same & known] if (same & known).any() else values[known]
        filled[same & ~known] = np.clip(others.mean(), others.min(), others.max()) if others.size else 0.0
    return filled
