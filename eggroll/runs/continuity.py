"""Whether every generation of a durable run begins with the state that the last one left, by checksums.

A change by hand between two generations would be lost on resume, since the journal does not rebuild it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from eggroll.journal.entries import Entry, Sums
from eggroll.journal.environment import environment_id
from eggroll.journal.header import JournalError
from eggroll.update.checksums import OtherState, compare, list_names


class Continuity:
    """The state that the next generation must begin with.

    Args:
        state: of the run; any one.
    """

    def __init__(self, state: Any):
        self._environment = environment_id(state)
        self._names: list[str] = []
        self._expected = np.zeros(0, np.uint32)
        self._recorded: np.ndarray | None = None  # what the last record says of it; None: nothing
        self.is_adopted = False  # the state was changed by hand since the last record

    def begin(self, checksums: Mapping[str, int], before: Entry | None) -> None:
        """Begin with a state, given its checksums by name and the record of the generation before."""
        self._recorded = before.sums.after if before is not None and before.sums is not None else None
        self._expect(checksums)

    def _expect(self, checksums: Mapping[str, int]) -> None:
        self._names, self._expected = list(checksums), np.array(list(checksums.values()), np.uint32)

    @property
    def is_as_recorded(self) -> bool:
        """Whether the state is the one that the last record ends with, as far as it says."""
        return self._recorded is None or np.array_equal(self._recorded, self._expected)

    def is_change(self, checksums: Mapping[str, int]) -> bool:
        """Whether a state, given its checksums, is none that the journal rebuilds: a checkpoint has to carry it."""
        return self.is_adopted or not self.is_as_recorded or [*checksums.values()] != self._expected.tolist()

    def adopt(self, checksums: Mapping[str, int]) -> None:
        """Continue with a changed state, of which a checkpoint was written."""
        self._expect(checksums)
        self.is_adopted = True

    def check(self, before: Any, *, generation: int) -> None:
        """Raise JournalError if a generation begins with another state, given the checksums of that state."""
        try:
            compare(self._names, self._expected, before)
        except OtherState as error:
            raise JournalError(
                f"the state was changed by hand before generation {generation}: {list_names(error.names)} are not "
                "as the last generation left them. The change would be lost on resume: give the changed state to `adopt` of "
                "the DurableRun before the next generation, or continue with the state that `step` returned."
            ) from None

    def sums(self, metrics: Any) -> Sums | None:
        """Return what is recorded of a generation, given its metrics."""
        if metrics.checksums is None:
            return None
        before, after = np.asarray(metrics.checksums)
        continues = self._recorded is not None and np.array_equal(before, self._recorded)
        return Sums(after, None if continues else before, self.is_adopted, self._environment)

    def advance(self, sums: Sums | None) -> None:
        """Go on to the state after a generation that was recorded."""
        self._recorded, self.is_adopted = (None if sums is None else sums.after), False
        self._expected = self._expected if sums is None else sums.after


def compare_again(recorded: Entry, again: Entry) -> None:
    """Raise JournalError if a generation, evaluated again, is not what its record says."""
    evaluated = f"generation {recorded.generation}, evaluated again, gave other"
    if not np.array_equal(recorded.coefficients, again.coefficients, equal_nan=True):
        raise JournalError(f"{evaluated} coefficients than the journal has.")
    one, two = recorded.sums, again.sums
    if one is not None and two is not None and one.environment == two.environment and (one.after != two.after).any():
        raise JournalError(f"{evaluated} values of the parameters or the optimizer's state than it did before.")
