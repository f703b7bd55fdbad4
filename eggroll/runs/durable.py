"""A run that survives a kill at any moment: its checkpoints and its journal in one folder.

    run = DurableRun(folder, es, es.init(params, key=key), config={...})
    state, history = train(es, run.state, batches, generations=..., durable=run)

Every generation is in the journal once `train` goes on to the next; checkpoints shorten the way back. Starting again reads the
last sound checkpoint and replays the journal from there: no generation is evaluated twice, and the run goes on bit for bit.
A carried `member_state` is in the checkpoints alone: with it the generations since the last one are evaluated again, and have
to give what the journal has.

Of several processes all make the same calls on the same folder; the first one writes the journal.
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from eggroll.journal.checkpoint import Checkpoints
from eggroll.journal import (Entry, JournalError, Reader, Writer, make_header, replay)
from eggroll.devices.processes import (is_first, wait_for_all)
from eggroll.state import ESState
from eggroll.strategy import EvolutionStrategy

logger = logging.getLogger(__name__)


class Carried(Protocol):
    """What a front end keeps beside the state, such as statistics of observations; it goes into every generation's record."""

    def save(self) -> Any:
        """Return it as a pytree of arrays, always of the same structure, shapes and dtypes."""

    def load(self, saved: Any) -> None:
        """Take it back."""


class DurableRun:
    """The files of a run, and the state to go on from.

    Args:
        folder: made if missing; `journal.bin` and `checkpoints/` are in it.
        es: the strategy, its plan made (`es.plan(state, batch)`).
        initial: the state at generation 0, made as the first time: parameters and key are compared with the journal's.
        config: JSON values that decide the run; a folder with another config is refused.
        carried: what belongs to the state beside it; is loaded.
        checkpoint_every: generations between checkpoints.
        keep: last checkpoints kept, besides the best.
        recipe: for the command line, `{"function": "module:name", "options": {...}}`: `name(options)` returns
            `(es, initial)` with the plan made.

    Raises:
        ValueError: the folder is of another run, or damaged so that it cannot go on; nothing is overwritten.
    """

    def __init__(
        self,
        folder: str | Path,
        es: EvolutionStrategy,
        initial: ESState,
        *,
        config: Mapping[str, Any],
        carried: Carried | None = None,
        checkpoint_every: int = 50,
        keep: int = 3,
        recipe: Mapping[str, Any] | None = None,
    ):
        if not isinstance(checkpoint_every, int) or checkpoint_every < 1:
            raise ValueError(f"checkpoint_every must be an integer >= 1, got {checkpoint_every!r}.")
        self._folder, self._every, self._carried = Path(folder), checkpoint_every, carried
        self._again: dict[int, Entry] = {}  # generations in the journal that are evaluated once more
        self._folder.mkdir(parents=True, exist_ok=True)
        self.checkpoints = Checkpoints(self._folder / "checkpoints", config=config, keep=keep)
        header = make_header(es, initial, recipe=recipe)
        path = self._folder / "journal.bin"
        if not path.exists() and self.checkpoints.generations:
            raise JournalError(f"{self._folder} has checkpoints, but its journal.bin is missing; bring it back or start anew.")
        self._journal = Writer(path, header) if is_first() else None
        if self._journal is None and path.exists():
            Reader(path).header.check(header)  # as the first process does: all refuse together
        if self._journal is not None and self._journal.note:
            logger.warning(self._journal.note)
        wait_for_all("eggroll journal")
        self.state = self._resume(es, initial, path)

    def _resume(self, es: EvolutionStrategy, initial: ESState, path: Path) -> ESState:
        seen: list[Entry] = []

        def remembering() -> Iterator[Entry]:
            for entry in Reader(path):
                seen[:] = [entry]
                yield entry

        state = self._last_sound(initial)
        if jax.tree.leaves(initial.member_state):
            self._again = {entry.generation: entry for entry in remembering() if entry.generation >= int(state.generation)}
        else:
            state = replay(es, state, remembering())
        reached = seen[0].generation + 1 if seen else 0
        if int(state.generation) > reached:
            raise JournalError(f"{path} ends at generation {reached}, before the checkpoint of {int(state.generation)}.")
        if seen and self._carried is not None and int(state.generation) == reached:
            self._carried.load(_unpacked(seen[0].extra, self._carried.save()))
        return state

    def _last_sound(self, initial: ESState) -> ESState:
        """The last checkpoint that can be read, or the initial state; what is carried is loaded."""
        like = None if self._carried is None else self._carried.save()
        for generation in reversed(self.checkpoints.generations):
            try:
                restored = self.checkpoints.restore(initial, like, generation=generation)
            except ValueError as error:
                logger.warning("%s; an earlier one is used.", error)
                continue
            if restored is not None:
                if self._carried is not None:
                    self._carried.load(restored[1])
                return restored[0]
        return initial

    def record(self, state: ESState, metrics: Any, *, score: float | None = None) -> None:
        """Keep a generation; when this returns, a kill does not lose it.

        Args:
            state: after the generation.
            metrics: `Metrics` of the generation, or the `training.Record`.
            score: of a held-out check, for the best checkpoint; higher is better.
        """
        carried = None if self._carried is None else self._carried.save()
        generation, coefficients = int(metrics.generation), np.asarray(metrics.coefficients)
        known = self._again.pop(generation, None)
        if known is not None and not np.array_equal(known.coefficients, coefficients, equal_nan=True):
            raise JournalError(f"generation {generation}, evaluated again, gave other coefficients than {self._folder} has.")
        if known is None and self._journal is not None:
            self._journal.append(Entry(generation, float(metrics.sigma), coefficients, _packed(carried)))
        if (generation + 1) % self._every == 0:
            if self._journal is not None:
                self._journal.sync()
            self.checkpoints.save(state, carried, score=score)

    def close(self) -> None:
        """Wait for the last checkpoint and close the files."""
        if self._journal is not None:
            self._journal.close()
        self.checkpoints.close()


def _packed(carried: Any) -> bytes:
    return b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(carried))


def _unpacked(extra: bytes, like: Any) -> Any:
    leaves, tree, start = [], jax.tree.structure(like), 0
    for leaf in map(np.asarray, jax.tree.leaves(like)):
        leaves.append(np.frombuffer(extra, leaf.dtype, leaf.size, offset=start).reshape(leaf.shape))
        start += leaf.nbytes
    if start != len(extra):
        raise JournalError(f"the journal carries {len(extra)} bytes a generation, this run {start}.")
    return jax.tree.unflatten(tree, leaves)
