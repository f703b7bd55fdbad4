"""Warnings of a run about itself: what was not finite, and what keeps it from learning; each is given once."""

import warnings

from eggroll.runs.record import Record

PATIENCE = 5  # generations in a row without information before a warning


class Diagnosis:
    """Looks at one generation after the other.

    Args:
        population_size: N, for the messages.
    """

    def __init__(self, population_size: int):
        self._population_size = population_size
        self._given: set[str] = set()
        self._tied = self._still = 0  # generations in a row

    def look(self, record: Record) -> None:
        """Warn of what a generation shows."""
        self._tied = self._tied + 1 if record.tied_pairs == 1 and not record.skipped else 0
        self._still = self._still + 1 if record.gradient_norm == 0 and not self._tied else 0
        size, generation = self._population_size, record.generation
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
                f"both members of every pair had the same fitness in {PATIENCE} generations in a row (last: {generation}), "
                f"so nothing is learned. Raise sigma (now {record.sigma:g}), sample actions or tokens instead of taking the "
                "best one, or give a member more episodes or examples",
            )
        if self._still == PATIENCE:
            self._once(
                "gradient_norm",
                f"the gradient was zero in {PATIENCE} generations in a row (last: {generation}), although members of pairs "
                "differ: the shaping gives them equal weight",
            )

    def _once(self, name: str, message: str) -> None:
        if name not in self._given:
            self._given.add(name)
            warnings.warn(f"{message} (warned once; see `{name}` in the history).", stacklevel=4)
