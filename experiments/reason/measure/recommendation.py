"""What a probe recommends, given its measurements.

sigma      the largest whose members keep `KEPT` of the unperturbed reward and of whose pairs at most `TIED` are tied
step size  the largest whose step changes at most `CHANGED` of the held-out texts, is at most `LENGTH` sigmas long, because a
           run makes many, and costs no reward beyond two standard errors
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

KEPT, TIED = 0.8, 0.95
CHANGED, LENGTH = 0.25, 0.3
CERTAIN = 0.1  # two standard errors of what is kept
SILENT = (
    "No completion scored above the minimum, neither of the unperturbed model nor of a member. Evolution compares rewards, so "
    "there is nothing that it could select: no sigma and no step size changes that. Look at the completions; try a template "
    "with worked examples, an easier task, a better model, a larger max_new_tokens, or a reward that gives partial credit."
)


class SigmaRow(NamedTuple):
    """What members do at one sigma."""

    sigma: float
    texts_changed: float
    tied_pairs: float
    reward: float  # mean of the members
    kept: float  # share of the unperturbed reward; NaN without one
    error: float  # standard error of that, over problems
    has_scored: bool  # a member or the unperturbed model scored above the minimum


class StepRow(NamedTuple):
    """What a step of one size does."""

    learning_rate: float
    over_sigma: float  # root mean square of the step of a weight, in sigmas
    over_weights: float  # the norm of the step over that of the weights
    texts_changed: float
    reward: float  # of the unperturbed model after the step
    is_worse: bool  # than without it, by more than two standard errors


def choose_sigma(rows: Sequence[SigmaRow]) -> tuple[float | None, str]:
    """Return the recommended sigma, None where nothing can be learned, and why."""
    if not any(row.has_scored for row in rows):
        return None, SILENT
    if all(math.isnan(row.kept) for row in rows):
        best = min(rows, key=lambda row: row.tied_pairs)
        return best.sigma, f"sigma {best.sigma:g} ties the fewest pairs; the unperturbed model has no reward to lose."
    fitting = [row for row in rows if row.kept >= KEPT]
    if not fitting:
        lowest = min(rows)
        return lowest.sigma, (
            f"Even at sigma {lowest.sigma:g} the members keep only {lowest.kept:.0%} of the unperturbed reward: probe smaller "
            f"ones with --sigma {lowest.sigma / 10:g}, or longer with --seconds."
        )
    untied = [row for row in fitting if row.tied_pairs <= TIED]
    chosen = max(untied or fitting)
    words = f"sigma {chosen.sigma:g} is the largest measured one whose members keep {KEPT:.0%} of the unperturbed reward"
    if not untied:
        words += f"; {chosen.tied_pairs:.0%} of its pairs are tied: give members more problems (--prompts), or draw completions"
        words += " (--temperature 1 --samples 4)"
    if 2 * chosen.error > CERTAIN:
        words += (
            f". It is uncertain: they keep {chosen.kept:.0%} +- {2 * chosen.error:.0%}; more --prompts make it more certain"
        )
    return chosen.sigma, words + "."


def fits(row: StepRow) -> bool:
    """Return whether a step is short enough to recommend."""
    return row.texts_changed <= CHANGED and row.over_sigma <= LENGTH and not row.is_worse
