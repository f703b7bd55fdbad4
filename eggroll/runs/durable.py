"""A run that survives a kill at any moment: its checkpoints and its journal in one folder.

    run = DurableRun(folder, es, es.init(params, key=key), config={...})
    state, history = train(es, run.state, batches, generations=..., durable=run)

Every generation is in the journal before `train` starts the next one. A restart reads the last sound checkpoint and replays the
journal from there: no generation is evaluated twice, and the run continues bit for bit. A carried `member_state` is stored in
the checkpoints only: with it, the generations since the last checkpoint are evaluated again and must reproduce the journal.

A generation must begin with the state that the last one left: a change by hand would be lost on resume. `adopt` carries it.

With several processes, every process makes the same calls on the same folder; the first one writes the journal.
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Generic

import jax
import numpy as np

from eggroll.devices.processes import first_does
from eggroll.journal import Entry, Header, JournalError, Reader, Writer, make_header, replay
from eggroll.journal.checkpoint import Checkpoints, OtherModel
from eggroll.journal.integrity import DamagedConfig
from eggroll.journal.lock import RunLock
from eggroll.journal.recovery import find_header, mend, plan
from eggroll.protocol import S, Strategy
from eggroll.runs.carried import Carried, pack, unpack
from eggroll.runs.continuity import Continuity, compare_again
from eggroll.state import check_not_consumed

logger = logging.getLogger(__name__)


class DurableRun(Generic[S]):
    """The files of a run, and `state`, from which it continues.

    Args:
        folder: created if missing; holds `journal.bin`, `journal.header.json` and `checkpoints/`.
        es: the strategy, with its plan (`es.plan(state, batch)`).
        initial: the state at generation 0; its parameters and key are compared with the journal's. Consumed: continue
            from the attribute `state`.
        config: JSON values that identify the run; a folder with another config is refused.
        carried: what is stored with the state; restored on resume.
        checkpoint_every: generations between checkpoints.
        keep: number of most recent checkpoints to keep, in addition to the best.
        accept_change: continue although fitness, optimizer, schedule of sigma or shaping are not those that the journal was
            written with, or although its header and the copy of it are damaged, so that this is not known. A state that the
            journal now rebuilds differently is adopted.
        recipe: for the command line, `{"function": "module:name", "options": {...}}`: `name(options)` returns
            `(es, initial)`, with the plan.
        lock: of the folder, which the caller holds and releases; None: the run holds its own until `close`.

    Raises:
        RunInUse: another process, or another object of this one, has the run open.
        ValueError: the folder belongs to another run, or is damaged beyond recovery; nothing is overwritten. `OtherModel`: its
            checkpoint has other arrays, such as those of another optimizer.
    """

    def __init__(
        self,
        folder: str | Path,
        es: Strategy[S],
        initial: S,
        *,
        config: Mapping[str, Any],
        carried: Carried | None = None,
        checkpoint_every: int = 50,
        keep: int = 3,
        accept_change: bool = False,
        recipe: Mapping[str, Any] | None = None,
        lock: RunLock | None = None,
    ):
        check_not_consumed(initial)
        if not isinstance(checkpoint_every, int) or checkpoint_every < 1:
            raise ValueError(f"checkpoint_every must be an integer >= 1, got {checkpoint_every!r}.")
        self._folder, self._every, self._carried, self._es = Path(folder).absolute(), checkpoint_every, carried, es
        self._reevaluated: dict[int, Entry] = {}  # generations in the journal that are evaluated again
        self._continuity = Continuity(initial)
        self._journal: Writer | None = None
        self._is_due = False  # a checkpoint
        self._folder.mkdir(parents=True, exist_ok=True)
        self._own_lock = first_does(lambda: RunLock(self._folder) if lock is None else None)
        self._lock = lock or self._own_lock
        try:
            header = make_header(es, initial, recipe=recipe)
            self._open(es, initial, header, config=config, keep=keep, accept_change=accept_change)
        except BaseException:
            if self._journal is not None:
                self._journal.close()
            if self._own_lock is not None:
                self._own_lock.release()
            raise

    def _open(
        self, es: Strategy[S], initial: S, header: Header, *, config: Mapping[str, Any], keep: int, accept_change: bool
    ) -> None:
        path = self._folder / "journal.bin"
        exists = path.exists()  # before the first process may create it
        stored = find_header(path) if exists else None
        self.checkpoints = self._open_checkpoints(header, stored, config=config, keep=keep, accept_change=accept_change)
        if not exists and self.checkpoints.generations:
            raise JournalError(
                f"{self._folder} has checkpoints, but its journal.bin is missing; restore the file, choose another folder, or "
                f"let `python -m eggroll.journal repair {self._folder}` give up the replay of the generations in it."
            )
        if stored is not None:
            stored.check(header, accept_change=accept_change)  # every process refuses, as the first one does
        elif exists and not accept_change:
            raise JournalError(
                f"the header of {path} and its copy are damaged or missing, so that it cannot be checked that the run is this "
                "one: choose another folder or, if you know that it is, continue with accept_change=True (--accept-change)."
            )
        state, damaged = self._restore_last(initial)
        is_unknown = (damaged and not int(state.generation)) or not _is_same_key(initial, state)
        if exists and stored is None and is_unknown:
            raise JournalError(f"the header of {path} is damaged, and the checkpoints are damaged or of another run.")
        self.checkpoints.set_aside(damaged)  # before a journal is refused, so that `repair` counts on sound ones only
        reached = int(state.generation)
        self._journal = first_does(lambda: self._open_journal(path, header, covered=reached, accept_change=accept_change))
        self.state = self._resume(es, state, path, accept_change=accept_change)

    def _open_checkpoints(
        self, header: Header, stored: Header | None, *, config: Mapping[str, Any], keep: int, accept_change: bool
    ) -> Checkpoints:
        """Open the checkpoints; a damaged config.json is written again if the journal shows that the run is this one."""
        folder = self._folder / "checkpoints"
        try:
            return Checkpoints(folder, config=config, keep=keep)
        except DamagedConfig as error:
            if stored is None:
                raise ValueError(f"{error} The journal cannot tell whose run it is either: choose another folder.") from None
            stored.check(header, accept_change=accept_change)
            return Checkpoints(folder, config=config, keep=keep, identified=True)

    def _open_journal(self, path: Path, header: Header, *, covered: int, accept_change: bool) -> Writer:
        """Open the journal, after mending it if it is damaged and the checkpoint of generation `covered` allows it."""
        if path.exists():
            chosen = plan(path, covered=covered)
            if chosen.writes or chosen.lost:
                logger.warning(" ".join(mend(path, chosen, header)) or f"{path} has a new header.")
        journal = Writer(path, header, covered=covered, accept_change=accept_change)
        if journal.note:
            logger.warning(journal.note)
        return journal

    def _resume(self, es: Strategy[S], state: S, path: Path, *, accept_change: bool) -> S:
        last: list[Entry] = []
        begin, before = int(state.generation), None  # before: the record of the generation before the checkpoint

        def entries() -> Iterator[Entry]:
            nonlocal before
            for entry in Reader(path, tolerant=True):
                last[:] = [entry]
                before = entry if entry.generation == begin - 1 else before
                yield entry

        if jax.tree.leaves(state.member_state):
            self._reevaluated = {entry.generation: entry for entry in entries() if entry.generation >= begin}
        else:
            state = replay(es, state, entries(), compared=not accept_change)
        self._next = int(state.generation)
        reached = last[0].generation + 1 if last else 0
        if last and self._carried is not None and self._next == reached:
            self._carried.load(unpack(last[0].extra, self._carried.save()))
        self._continuity.begin(es.checksums(state), last[0] if self._next > begin else before)
        if not self._continuity.is_as_recorded and not self._reevaluated:
            if self._next == begin:
                logger.warning("the checkpoint of generation %d has a state that was changed by hand and adopted.", begin)
                self._continuity.is_adopted = True
            elif accept_change:
                self._adopt(state)
        return state

    def _restore_last(self, initial: S) -> tuple[S, list[int]]:
        """Restore the last sound checkpoint and what is carried; without one, return the initial state.

        Returns:
            The state, and the generations of later checkpoints, which are damaged.
        """
        like, damaged = None if self._carried is None else self._carried.save(), list[int]()
        for generation in reversed(self.checkpoints.generations):
            try:
                restored = self.checkpoints.restore(initial, like, generation=generation)
            except OtherModel:
                raise
            except ValueError as error:
                logger.warning("%s; an earlier one is used.", error)
                damaged.append(generation)
                continue
            if restored is not None:
                if self._carried is not None:
                    self._carried.load(restored[1])
                return restored[0], damaged
        return initial, damaged

    def check(self, metrics: Any = None) -> None:
        """Check that the folder is still this run's and, given the metrics of a generation, that it began with the right state.

        Raises:
            RunLost: the folder was moved or deleted, or another process took over.
            JournalError: the state was changed by hand before the generation, and not adopted.
        """
        if self._lock is not None:
            self._lock.check()
        if metrics is not None and metrics.checksums is not None:
            self._continuity.check(metrics.checksums[0], generation=int(metrics.generation))

    def check_start(self, state: S) -> None:
        """Check that a state is the one that the run continues from.

        Raises:
            ValueError: it is of another generation. RunLost, JournalError: as `check`.
        """
        self.check()
        if int(state.generation) != self._next:
            raise ValueError(
                f"the state is of generation {int(state.generation)}, and the run in {self._folder} continues at generation "
                f"{self._next}: pass the attribute `state` of the DurableRun."
            )
        self._continuity.check(np.array(list(self._es.checksums(state).values()), np.uint32), generation=self._next)

    def adopt(self, state: S) -> None:
        """Carry a state that was changed by hand, such as its weights or the learning rate in its optimizer's state.

        A checkpoint of it is written at once, from which the run resumes. The journal does not rebuild the change: a replay
        over it is refused, and begins at that checkpoint. Not needed for `sigma`, which is recorded, `member_state`, and
        collections that are not parameters (docs/models.md).

        Args:
            state: that the next generation begins with; not consumed.

        Raises:
            ValueError: it is of another generation.
            OSError: the checkpoint cannot be written; the run continues with the state that it had.
            RunLost: the folder was moved or deleted, or another process took over; nothing is written.
        """
        check_not_consumed(state)
        self.check()
        if int(state.generation) != self._next or self._reevaluated:
            raise ValueError(f"adopt needs the state that generation {self._next + len(self._reevaluated)} begins with.")
        self._adopt(state)

    def _adopt(self, state: S) -> None:
        checksums = self._es.checksums(state)
        if self._continuity.is_change(checksums):
            if self._journal is not None:
                self._journal.sync()
            self.checkpoints.save(state, None if self._carried is None else self._carried.save(), replace=True)
            self._continuity.adopt(checksums)

    def record(self, state: S | None, metrics: Any, *, score: float | None = None) -> None:
        """Record a generation; once this returns, a kill does not lose it.

        Args:
            state: after the generation; None: only later ones are seen by the host, and a checkpoint that is due waits.
            metrics: `Metrics` or `record.Record` of the generation.
            score: held-out score that decides the best checkpoint; higher is better.

        Raises:
            RunLost, JournalError: as `check`; nothing is written.
        """
        self.check(metrics)
        carried = None if self._carried is None else self._carried.save()
        scalars = float(metrics.sigma), np.asarray(metrics.coefficients), pack(carried), float(metrics.mean_fitness)
        entry = Entry(int(metrics.generation), *scalars, self._continuity.sums(metrics))
        if (recorded := self._reevaluated.pop(entry.generation, None)) is not None:
            compare_again(recorded, entry)
        elif self._journal is not None:
            self._journal.append(entry)
        self._continuity.advance(entry.sums)
        self._next = entry.generation + 1
        self._is_due = self._is_due or self._next % self._every == 0
        if self._is_due and state is not None:
            self._is_due = False
            if self._journal is not None:
                self._journal.sync()
            self.checkpoints.save(state, carried, score=score)

    @property
    def generations_to_checkpoint(self) -> int:
        """Generations until a checkpoint is due."""
        return self._every - self._next % self._every

    def close(self) -> None:
        """Wait for the last checkpoint and close the files."""
        try:
            if self._journal is not None:
                self._journal.close()
            self.checkpoints.close()
        finally:
            if self._own_lock is not None:
                self._own_lock.release()


def _is_same_key(initial: Any, state: Any) -> bool:
    """Whether two states are of runs with one key."""
    return initial.key.dtype == state.key.dtype and bool((initial.key == state.key).all())
