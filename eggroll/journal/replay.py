"""Seed replay of a journal: apply the recorded coefficients to a state."""

from collections.abc import Iterator

import jax

from eggroll.journal.entries import Entry
from eggroll.journal.header import JournalError
from eggroll.protocol import S, Strategy
from eggroll.state import check_not_consumed


def replay(es: Strategy[S], state: S, entries: Iterator[Entry], *, until: int | None = None) -> S:
    """Apply the recorded generations.

    Args:
        es: the strategy of the run, with its plan.
        state: at any generation; earlier entries are skipped. Consumed where an entry is applied.
        entries: from a `Reader`.
        until: stop at this generation; None: at the end.

    Returns:
        The state, bit for bit that of the run on the same backend.

    Raises:
        JournalError: the entries start after the state, or end before `until`.
    """
    check_not_consumed(state)
    reached = int(state.generation)
    for entry in entries:
        if entry.generation < reached:
            continue
        if reached == until:
            break
        if entry.generation != reached:
            raise JournalError(f"the journal starts with generation {entry.generation}, after the state's {reached}.")
        if not callable(es.sigma):
            state = state._replace(sigma=jax.numpy.float32(entry.sigma))
        state, reached = es.replay(state, entry.coefficients, mean_fitness=entry.mean_fitness), reached + 1
    if until is not None and reached < until:
        raise JournalError(f"generation {until} is not in the journal, which ends at {reached}.")
    return state
