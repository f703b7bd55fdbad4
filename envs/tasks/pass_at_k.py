"""Objectives over several completions of a prompt: is one of k right?

    pass@k = 1 - C(n - c, k) / C(n, k)

is the unbiased estimate from n >= k samples of which c are right: the probability that k of them, drawn without replacement,
are not all wrong (Chen et al. 2021, arXiv 2107.03374, equation 1). With n = k it is 1 if any sample is right, else 0.
"""

import math

import numpy as np
from numpy.typing import ArrayLike


def pass_at_k(passed: ArrayLike, *, k: int, has_score: ArrayLike = True) -> np.ndarray:
    """Estimate pass@k of every prompt.

    Args:
        passed: bool [..., n], which of a prompt's samples are right.
        k: from 1 to n.
        has_score: bool [..., n], False for samples without a score, which are left out.

    Returns:
        float64 [...], NaN where fewer than k samples are left.

    Raises:
        ValueError: `k` is out of its bounds, or `passed` is not of bools.
    """
    right = np.asarray(passed)
    if right.dtype != np.bool_ or right.ndim < 1:
        raise ValueError(f"passed must be bool [..., samples], such as scores >= 1, got {right.dtype} {list(right.shape)}.")
    samples = right.shape[-1]
    if not 1 <= k <= samples:
        raise ValueError(f"k must be between 1 and the {samples} samples of a prompt, got {k}.")
    judged = np.broadcast_to(np.asarray(has_score, np.bool_), right.shape)
    left, correct = judged.sum(axis=-1), (right & judged).sum(axis=-1)
    estimates = np.full(left.shape, np.nan)
    for n in map(int, np.unique(left[left >= k])):
        table = np.array([1 - math.comb(n - c, k) / math.comb(n, k) for c in range(n + 1)])
        estimates[left == n] = table[correct[left == n]]
    return estimates
