"""Seed replay of a journal: apply the recorded coefficients to a state, and compare what comes out with the checksums."""

import warnings
from collections.abc import Iterator

import jax
import numpy as np

from eggroll.journal.entries import Entry
from eggroll.journal.environment import describe_environment, environment_id
from eggroll.journal.header import JournalError
from eggroll.protocol import S, Strategy
from eggroll.state import check_not_consumed
from eggroll.update.checksums import OtherState, compare, list_names


def replay(es: Strategy[S], state: S, entries: Iterator[Entry], *, until: int | None = None, compared: bool = True) -> S:
    """Apply the recorded generations.

    The checksums after every generation are compared with those recorded, as long as the update runs where it ran then.
    Elsewhere the results are equal up to rounding: one warning says so.

    Args:
        es: the strategy of the run, with its plan.
        state: at any generation; earlier entries are skipped. Consumed where an entry is applied.
        entries: from a `Reader`.
        until: stop at this generation, not before the state's; None: at the end.
        compared: whether to compare checksums.

    Returns:
        The state, bit for bit that of the run in the same environment.

    Raises:
        JournalError: `until` is before the state; the entries start after the state, or end before `until`; a generation comes
            out differently; the state was changed by hand between two of them.
    """
    check_not_consumed(state)
    reached, here = int(state.generation), environment_id(state)
    if until is not None and until < reached:
        raise JournalError(f"cannot replay to generation {until}: the state is at {reached}.")
    same, rounded = True, list[int]()  # whether the state is bit for bit that of the run; generations from elsewhere
    for entry in entries:
        if entry.generation < reached:
            continue
        if reached == until:
            break
        if entry.generation != reached:
            raise JournalError(f"the journal starts with generation {entry.generation}, after the state's {reached}.")
        if entry.sums is not None and entry.sums.before is not None:
            same = _is_state_before(es, state, entry, is_here=entry.sums.environment == here, compared=compared)
        same = same and entry.sums is not None and entry.sums.environment == here
        if entry.sums is not None and not same:
            rounded.append(reached)
        state, reached = _apply(es, state, entry, compared=compared and same), reached + 1
    if until is not None and reached < until:
        raise JournalError(f"generation {until} is not in the journal, which ends at {reached}.")
    if rounded and compared:
        warnings.warn(
            f"generations {rounded[0]} to {rounded[-1]} are replayed up to rounding and not compared: they, or generations "
            f"before them, ran in another environment than this one ({describe_environment(state)}).",
            stacklevel=2,
        )
    return state


def _is_state_before(es: Strategy[S], state: S, entry: Entry, *, is_here: bool, compared: bool) -> bool:
    """Whether the state is that before a generation, which does not begin with the one that the generation before left."""
    assert entry.sums is not None
    found = es.checksums(state)
    try:
        compare([*found], entry.sums.before, np.array([*found.values()], np.uint32))
    except OtherState as error:
        names, generation = list_names(error.names), entry.generation
        if entry.sums.is_adopted:
            raise JournalError(
                f"the state was changed by hand before generation {generation} ({names}), which the journal does not rebuild: "
                f"replay from the checkpoint of generation {generation} or a later one. If the run has none any more, "
                "`python -m eggroll.journal repair RUN` sets the generations from there on aside."
            ) from None
        if generation == 0 and is_here and compared:
            raise JournalError(f"the run began with another state: {names} differ.") from None
        return False
    return True


def _apply(es: Strategy[S], state: S, entry: Entry, *, compared: bool) -> S:
    state = state._replace(sigma=jax.numpy.float32(entry.sigma))
    checksums = entry.sums.after if compared and entry.sums is not None else None
    try:
        return es.replay(state, entry.coefficients, mean_fitness=entry.mean_fitness, checksums=checksums)
    except OtherState as error:
        raise JournalError(
            f"generation {entry.generation}, replayed, gives other values than the run had: {list_names(error.names)} differ. "
            "The optimizer or the code of the update is another one (as in an older or newer eggroll), or memory is faulty: "
            "restore them, or continue a run from what they give now with accept_change=True (--accept-change)."
        ) from None
