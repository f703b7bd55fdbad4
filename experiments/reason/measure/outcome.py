"""What training changed on the test problems: accuracies before and after, an interval of the difference, and completions.

interval = mean d +- 1.96 std d / sqrt(n),     d_i = score after - score before of problem i        95 %, paired
"""

import math
from typing import Any

import numpy as np

from eggroll.experiments.reason.problem import Check

_DEVIATIONS = 1.96  # of a normal distribution, 95 %


def compare(before: Check, after: Check) -> dict[str, Any]:
    """Compare two checks of the same problems; those without a score in one of them are left out of the interval."""
    low, high = paired_interval(before.scores, after.scores)
    return {
        "accuracy_before": before.accuracy,
        "accuracy_after": after.accuracy,
        "interval": [low, high],
        "problems": len(after.scores),
    }


def paired_interval(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of the mean difference of scores [n], NaN where a problem has none; NaN of fewer than two."""
    differences = (after - before)[~np.isnan(after - before)].astype(np.float64)
    if len(differences) < 2:
        return math.nan, math.nan
    half = _DEVIATIONS * differences.std(ddof=1) / math.sqrt(len(differences))
    return float(differences.mean() - half), float(differences.mean() + half)


def make_report(seed: int, result: dict[str, Any], before: Check, after: Check) -> str:
    """Return the lines that a run prints at its end: accuracies, and the completions of the first problems."""
    low, high = result["interval"]
    interval = "no interval of fewer than two problems" if math.isnan(low) else f"95 % interval {low:+.3f} to {high:+.3f}"
    change = f"{after.accuracy - before.accuracy:+.3f}, {interval}"
    accuracies = f"{before.accuracy:.3f} before, {after.accuracy:.3f} after: {change}"
    lines = [f"seed {seed}: accuracy on {result['problems']} test problems {accuracies}"]
    for (prompt, first, first_score), (_, second, second_score) in zip(before.examples, after.examples, strict=True):
        lines.append(f"    {prompt!r}  before {first!r} ({first_score:.2f})  after {second!r} ({second_score:.2f})")
    return "\n".join(lines)
