"""From one state that the host sees to the next: a generation, or several on the device in one program (`eggroll.scan`).

Generations that run together end at a multiple of their number, so that a run that is resumed ends them where an uninterrupted
one does.
"""

import functools
import itertools
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Generic

import jax
import jax.numpy as jnp
import numpy as np

from eggroll import programs
from eggroll.devices.processes import local, report_lost_process
from eggroll.generation import LAST_GENERATION
from eggroll.population.metrics import Metrics
from eggroll.protocol import S, Strategy
from eggroll.runs.record import Record
from eggroll.scan import NextBatch, check_scannable, follow, run_scan
from eggroll.state import copy_state
from eggroll.update.checksums import OtherState, list_names


class Advance(Generic[S]):
    """Runs the next generations of a run.

    Args:
        es: the strategy.
        batches: as for `train`.
        on_device: the most generations of one program; 1: each by itself.
        next_batch: as for `train`.
        is_replayed: whether the first scan is compared with its replay, which a durable run relies on. Should the compiler have
            rounded otherwise in one of them, there is a warning, and all generations run one by one.

    Raises:
        ValueError, TypeError: a wrong argument; the message names it.
    """

    def __init__(self, es: Strategy[S], batches: Any, *, on_device: int, next_batch: NextBatch | None, is_replayed: bool):
        if not isinstance(on_device, int) or isinstance(on_device, bool) or on_device < 1:
            raise ValueError(f"on_device must be an integer >= 1, got {on_device!r}.")
        if on_device > 1:
            check_scannable(es)
        changes = isinstance(batches, Iterator) or callable(batches)
        if next_batch is not None and changes:
            raise ValueError(
                "next_batch makes all batches but the first, which batches must be: not a function or an iterator."
            )
        self._es, self._length, self._next_batch, self._is_replayed = es, on_device, next_batch, is_replayed
        self._batches, self._changes = batches, changes
        self._paths: list[str] = []  # of the parameters
        self._has_scanned = False  # a single generation then runs in the program that is there

    def __call__(self, state: S, most: int) -> tuple[S, list[Record]]:
        """Run at most `most` generations, at least one; no records: the batches have ended."""
        generation = int(state.generation)
        if generation == LAST_GENERATION:
            raise OverflowError(f"a run ends at generation {LAST_GENERATION:,}, where its counter does.")
        count = max(1, min(most, self._length - generation % self._length, LAST_GENERATION - generation))
        batches = self._take(generation, count)
        if not batches:
            return state, []
        with report_lost_process(f"generation {generation}"):
            count = len(batches) if self._changes else count
            if count == 1 and not self._has_scanned:
                return self._step(state, batches[0])
            return self._scan(state, batches, count)

    def _take(self, generation: int, count: int) -> Sequence[Any]:
        """The batches of the next generations, only one if it is the same for all; fewer, or none, where an iterator ends."""
        if not self._changes:
            return [self._batches]
        if isinstance(self._batches, Iterator):
            return list(itertools.islice(self._batches, count))
        return [self._batches(generation + index) for index in range(count)]

    def _step(self, state: S, batch: Any) -> tuple[S, list[Record]]:
        start = time.perf_counter()
        state, metrics = self._es.step(state, batch)
        follows = None
        if self._next_batch is not None:
            follow_up = functools.partial(follow, self._next_batch)
            program = programs.compile_once("next batch", self._next_batch, function=follow_up)
            follows = self._batches = program(batch, local(metrics._replace(fitness=None)))
        # One transfer: it is also what waits for the generation to finish.
        scalars, norms, checksums = jax.device_get((metrics.scalars, metrics.leaf_norms, metrics.checksums))
        seconds = time.perf_counter() - start
        numbers = {name: value.item() for name, value in scalars.items()}
        record = Record(
            **numbers,
            aux=metrics.aux,
            coefficients=metrics.coefficients,
            fitness=metrics.fitness,
            checksums=checksums,
            batch=follows,
            leaf_norms=self._named(state, norms),
            seconds=seconds,
            members_per_second=self._es.population_size / seconds,
        )
        return state, [record]

    def _scan(self, state: S, batches: Sequence[Any], count: int) -> tuple[S, list[Record]]:
        before = copy_state(state) if self._is_replayed else None
        batch, start = self._stack(batches) if self._changes else batches[0], time.perf_counter()
        state, following, found = run_scan(
            self._es,
            state,
            batch,
            count=count,
            length=self._length,
            stacked=self._changes,
            next_batch=self._next_batch,
        )
        self._has_scanned = True
        metrics, follows = jax.device_get((found, None if self._next_batch is None else following))
        seconds = (time.perf_counter() - start) / count
        records = self._records(state, metrics, follows, count, seconds)
        if before is not None:
            self._is_replayed = False  # they are compared
            if differing := self._compare(copy_state(before), records):
                warnings.warn(f"{differing}: generations run one by one instead, as with on_device=1.", stacklevel=4)
                self._length, self._has_scanned = 1, False
                return self._step_through(before, batches)
        if self._next_batch is not None:
            self._batches = records[-1].batch
        return state, records

    def _stack(self, batches: Sequence[Any]) -> Any:
        """Batches with a leading axis [length]; the last one fills up."""
        if len({programs.signature(batch) for batch in batches}) > 1:
            raise ValueError("on_device needs batches of the same structure, shapes and dtypes in all generations.")
        filled = [*batches, *[batches[-1]] * (self._length - len(batches))]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *filled)

    def _records(self, state: S, metrics: Metrics, follows: Any, count: int, seconds: float) -> list[Record]:
        """Records of the generations of a scan, whose metrics are on the host with a leading axis."""
        names = list(metrics.scalars)
        columns = [column.tolist() for column in metrics.scalars.values()]  # Python numbers
        norms = np.asarray(metrics.leaf_norms)
        rate, records = self._es.population_size / seconds, []
        for index, row in zip(range(count), zip(*columns, strict=True), strict=False):
            aux, batch = (jax.tree.map(lambda leaf: leaf[index], part) for part in (metrics.aux, follows))  # noqa: B023
            record = Record(
                **dict(zip(names, row, strict=True)),
                seconds=seconds,
                members_per_second=rate,
                aux=aux,
                coefficients=metrics.coefficients[index],
                leaf_norms=self._named(state, norms[index]),
                checksums=None if metrics.checksums is None else metrics.checksums[index],
                batch=batch,
            )
            records.append(record)
        return records

    def _named(self, state: S, norms: np.ndarray) -> dict[str, float]:
        """Norms of the parameters by their path."""
        if norms.size and not self._paths:
            self._paths = [leaf.path for leaf in self._es.plan(state).leaves]
        return dict(zip(self._paths, norms.tolist(), strict=True)) if norms.size else {}

    def _step_through(self, state: S, batches: Sequence[Any]) -> tuple[S, list[Record]]:
        """Run a generation for each batch, one by one."""
        records: list[Record] = []
        for batch in batches:
            state, made = self._step(state, batch)
            records += made
        return state, records

    def _compare(self, state: S, records: Sequence[Record]) -> str:
        """Compare a scan that began with a state, which is consumed, with its replay; say what differs, "" if nothing does."""
        for record in records:
            try:
                state = self._es.replay(
                    state._replace(sigma=jnp.float32(record.sigma)),
                    record.coefficients,
                    mean_fitness=record.mean_fitness,
                    checksums=record.checksums[1],
                )
            except OtherState as error:
                return (
                    f"on_device rounds the updates of this strategy differently than replay does ({list_names(error.names)} "
                    f"differ after generation {record.generation})"
                )
        return ""
