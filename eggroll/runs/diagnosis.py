"""What a run says of itself: what was not finite, what keeps it from learning, what to change; each warning is given once."""

import math
import statistics
import warnings
from collections.abc import Sequence

from eggroll.noise.leaves import FrozenLeaf
from eggroll.noise.plan import Plan
from eggroll.runs.record import Record

PATIENCE = 5  # generations in a row before a warning
FAR = 10.0  # sigmas that an update may move a weight by; the gradient estimate is not valid beyond
SHARED = 0.99  # correlation of the members of pairs above which a pair's fitness is that of its random key
RECENT = 20  # generations that an advice looks at
GROWTH, OUTGROWN = 3.0, 30.0  # of the weights over a run; of their root mean square over sigma
WARNED = ("tied_pairs", "update_over_sigma")  # numbers that `Diagnosis` looks at, while a run lasts
NOTHING_UNUSUAL = "Try another learning rate or sigma, a larger population, or more generations."


class Diagnosis:
    """Looks at one generation after the other.

    Args:
        population_size: N, for the messages.
    """

    def __init__(self, population_size: int):
        self._population_size = population_size
        self._given: set[str] = set()
        self._tied = self._still = self._far = 0  # generations in a row
        self._norm = math.inf  # of the weights after the first generation

    def look(self, record: Record) -> None:
        """Warn of what a generation shows."""
        self._tied = self._tied + 1 if record.tied_pairs == 1 and not record.skipped else 0
        self._still = self._still + 1 if record.gradient_norm == 0 and not self._tied else 0
        self._far = self._far + 1 if record.update_over_sigma > FAR and not record.skipped else 0
        self._norm = record.weight_norm if math.isinf(self._norm) else self._norm
        size, generation = self._population_size, record.generation
        in_a_row = f"in {PATIENCE} generations in a row (last: {generation})"
        if record.skipped:
            why = f"the fitness of all {size} members, or the coefficients or sigma, was not finite"
            warnings.warn(f"generation {generation} was skipped: {why}.", stacklevel=3)
        elif record.kept:
            self._once(
                "kept",
                f"{record.kept} blocks of parameters kept their old values in generation {generation}: the new ones, or the "
                "optimizer's, would not have been finite",
            )
        elif record.invalid:
            self._once(
                "invalid", f"the fitness of {record.invalid} of {size} members was not finite in generation {generation}"
            )
        if self._tied == PATIENCE:
            self._once(
                "tied_pairs",
                f"both members of every pair had the same fitness {in_a_row}, so nothing is learned. "
                + (_shrink(self._norm, record) if record.weight_norm > GROWTH * self._norm else _untie(record.sigma)),
            )
        if self._still == PATIENCE:
            self._once(
                "gradient_norm",
                f"the gradient was zero {in_a_row}, although members of pairs differ: the shaping gives them equal weight",
            )
        if self._far == PATIENCE:
            self._once(
                "update_over_sigma",
                f"updates moved the weights by more than {FAR:g} sigma {in_a_row}, the last time by "
                f"{record.update_over_sigma:.3g}: beyond the perturbations that they were estimated from. "
                + _come_closer(record.sigma),
            )

    def _once(self, name: str, message: str) -> None:
        if name not in self._given:
            self._given.add(name)
            warnings.warn(f"{message} (warned once; see `{name}` in the history).", stacklevel=4)


def find_unusual(history: Sequence[Record], plan: Plan) -> dict[str, str]:
    """Say which numbers of the last generations are unusual, and what to change.

    Args:
        history: from `train`, or from `record.read_records` for a run that was continued.
        plan: of the parameters.

    Returns:
        Name of the number, as in `metrics.jsonl` -> a sentence or more; empty: nothing is.
    """
    last = [record for record in history[-RECENT:] if math.isfinite(record.mean_fitness)]  # others were skipped, with a warning
    if not last:
        return {}

    def median(name: str) -> float:
        return statistics.median(getattr(record, name) for record in last)

    perturbed = sum(math.prod(leaf.shape) for leaf in plan.leaves if not isinstance(leaf, FrozenLeaf))
    sigma, weight = last[-1].sigma, last[-1].weight_norm / math.sqrt(max(1, perturbed))
    found = {}
    if median("update_over_sigma") > FAR:
        found["update_over_sigma"] = (
            f"Updates moved the weights by {median('update_over_sigma'):.3g} sigma (update_over_sigma), beyond the "
            f"perturbations that they were estimated from. {_come_closer(sigma)}."
        )
    tied, correlation = median("tied_pairs"), median("pair_correlation")
    before, now = history[0].weight_norm, last[-1].weight_norm
    differ_little = tied > 0.5 or correlation > SHARED
    if differ_little and not found and now > GROWTH * before and weight > OUTGROWN * sigma:
        found["weight_norm"] = (
            f"The members of a pair had nearly the same fitness (pair_correlation {correlation:.4f}, tied_pairs {tied:.0%}). "
            f"{_shrink(before, last[-1])}."
        )
        return found
    if tied > 0.5:
        share = f"{tied:.0%} of the pairs had members of the same fitness (tied_pairs)"
        found["tied_pairs"] = f"{share}, which teach nothing. {_untie(sigma)}."
    if correlation > SHARED:
        shared = f"The members of a pair had nearly the same fitness (pair_correlation {correlation:.4f})"
        found["pair_correlation"] = f"{shared}, which is that of their random key or examples. Raise sigma (now {sigma:g})."
    if sigma > 3 * weight:
        found["weight_norm"] = (
            f"Sigma ({sigma:g}) is {sigma / weight if weight else math.inf:.3g} times as large as the weights (root mean "
            f"square {weight:.3g} by weight_norm), which it drowns. Lower sigma."
        )
    return found


def advise(history: Sequence[Record], plan: Plan) -> str:
    """Say what the last generations of a run without gain show, and what to change, in a sentence or more.

    Args:
        history: from `train`, or from `record.read_records` for a run that was continued.
        plan: of the parameters.
    """
    if not history:
        return "No generation was run."
    return " ".join(find_unusual(history, plan).values()) or NOTHING_UNUSUAL


def _untie(sigma: float) -> str:
    return (
        f"Raise sigma (now {sigma:g}), sample actions or tokens instead of taking the best one, or give a member more episodes "
        "or examples"
    )


def _shrink(before: float, record: Record) -> str:
    return (
        f"The norm of the weights grew from {before:.3g} to {record.weight_norm:.3g} (weight_norm), so that sigma "
        f"({record.sigma:g}) changes little. Lower the learning rate"
    )


def _come_closer(sigma: float) -> str:
    return f"Raise sigma (now {sigma:g}), or lower the learning rate"
