"""Objectives over several completions of a prompt: is one of k right?

    pass@k = 1 - C(n - c, k) / C(n, k)

is the unbiased estimate from n >= k samples of which c are right: the probability that k of them, drawn without replacement,
are not all wrong (Chen et al. 2021, arXiv 2107.03374, equation 1). With n = k it is 1 if any sample is right, else 0.
"""

import math

import numpy as np
from numpy.typing import ArrayLike


def pass_at_k(passed: ArrayLike, *, k: int) -> np.ndarray:
    """Estimate pass@k of every prompt.

    Args:
        passed: bool [..., n], which of a prompt's samples are right.
        k: from 1 to n.

    Returns:
        float64 [...].

    Raises:
        ValueError: `k` is out of its bounds, or `passed` is not of bools.
    """
    right = np.asarray(passed)
    if right.dtype != np.bool_ or right.ndim < 1:
        raise ValueError(f"passed must be bool [..., samples], such as scores >= 1, got {right.dtype} {list(right.shape)}.")
    n = right.shape[-1]
    if not 1 <= k <= n:
        raise ValueError(f"k must be between 1 and the {n} samples of a prompt, got {k}.")
    estimates = np.array([1 - math.comb(n - c, k) / math.comb(n, k) for c in range(n + 1)])
    return np.take(estimates, right.sum(axis=-1))
