"""Fitness computed by any Python code on many machines, through Ray: members travel as addresses, scalars come back.

    with RemoteEvaluator(es, score, state, num_workers=8, deadline=60) as workers:
        for generation in range(100):
            fitness, pairs = workers.evaluate(state)
            state, metrics = es.tell(state, fitness, pairs=pairs)
            workers.advance(state, metrics)

Every worker has the parameters, draws the noise of a member from its address, builds the member and calls `score(params, key)`.
After a generation only the pair coefficients travel, and every worker repeats the update. A worker that dies gives its pairs to
another and is replaced; pairs that are late are dropped, and `tell` keeps the estimate unbiased.
"""

import collections
import dataclasses
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from eggroll import noise
from eggroll.metrics import Metrics
from eggroll.state import ESState
from eggroll.strategy import EvolutionStrategy

MANY_DEATHS = 3  # of every worker in one generation: something else is wrong
Score = Callable[[Any, jax.Array], float]  # score(params of a member, key) -> fitness, higher is better


class Worker:
    """One process: the state, and members of it on demand."""

    def __init__(self, es: EvolutionStrategy, score: Score, state: Any, key_data: np.ndarray):
        self._es, self._score = es, score
        self._build: Callable = jax.jit(lambda state, index: es.ask(state).member(index))
        key = jax.random.wrap_key_data(jax.numpy.asarray(key_data), impl="threefry2x32")  # keys do not travel, words do
        self._state: ESState = jax.tree.map(jax.numpy.asarray, state)._replace(key=key)

    def advance(self, generation: int, coefficients: np.ndarray) -> None:
        """Repeat the update of a generation."""
        if int(self._state.generation) == generation:
            self._state = self._es.replay(self._state, coefficients)

    def generation(self) -> int:
        """The generation that is evaluated next."""
        return int(self._state.generation)

    def evaluate(self, pairs: Sequence[int]) -> tuple[list[float], list[str]]:
        """Fitness of both members of every pair, and the errors of the score, whose fitness is NaN."""
        key = jax.random.fold_in(noise.stream_key(self._state.key, 1), self._state.generation)
        errors: list[str] = []
        members = [(2 * pair + sign, jax.random.fold_in(key, pair)) for pair in pairs for sign in (0, 1)]
        return [self._fitness(*member, errors) for member in members], errors

    def _fitness(self, index: int, key: jax.Array, errors: list[str]) -> float:
        try:
            return float(self._score(self._build(self._state, index), key))
        except Exception as error:  # the user's code: a member that cannot be scored is the worst
            errors.append(f"{type(error).__name__}: {error}")
            return float("nan")


class _Task(NamedTuple):
    """Pairs that a worker is at."""

    worker: Any
    pairs: range
    generation: int


@dataclasses.dataclass
class Report:
    """What happened in the last generation."""

    dropped: int = 0  # pairs that were late
    deaths: int = 0  # workers that were lost
    errors: list[str] = dataclasses.field(default_factory=list)  # of the score, one for each member that it failed on


class RemoteEvaluator:
    """Evaluates populations on Ray workers. Ray must be initialised, or it starts on this machine.

    Args:
        es: the strategy; its plan is made.
        score: `score(params, key) -> float` of one member, any Python code; both members of a pair get the same key.
        state: the state to evaluate first.
        num_workers: processes, each with one CPU unless `resources` says otherwise.
        pairs_per_task: pairs a worker is given at a time.
        deadline: seconds of a generation after which pairs are dropped; None: wait for all.
        resources: options of Ray actors, such as {"num_gpus": 1}.

    Raises:
        ModuleNotFoundError: ray is not installed.
        ValueError: a count is not positive.
    """

    def __init__(
        self,
        es: EvolutionStrategy,
        score: Score,
        state: ESState,
        *,
        num_workers: int,
        pairs_per_task: int = 8,
        deadline: float | None = None,
        resources: dict[str, Any] | None = None,
    ):
        import ray

        for name, value in (("num_workers", num_workers), ("pairs_per_task", pairs_per_task), ("deadline", deadline)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value!r}.")
        self._ray, self._es, self._state = ray, es, state
        if not ray.is_initialized():
            ray.init(log_to_driver=False, include_dashboard=False)
        self._actor = ray.remote(Worker).options(**({"num_cpus": 1} | (resources or {})))
        self._es_ref, self._score_ref = ray.put(es), ray.put(score)
        self._pairs_per_task, self.deadline = pairs_per_task, deadline
        self._workers: list[Any] = []
        self._running: dict[Any, _Task] = {}  # by Ray's reference to the result
        self.report, self._warned = Report(), False
        self.resize(num_workers)

    def resize(self, num_workers: int) -> None:
        """Let workers join, with the parameters of now, or leave."""
        while len(self._workers) > num_workers:
            self._ray.kill(self._workers.pop())
        while len(self._workers) < num_workers:
            self._workers.append(self._new_worker())

    def _new_worker(self) -> Any:
        words = np.asarray(jax.random.key_data(self._state.key))
        without_key: Any = self._state._replace(key=words)  # type: ignore[arg-type]
        return self._actor.remote(self._es_ref, self._score_ref, jax.device_get(without_key), words)

    @property
    def workers(self) -> tuple[Any, ...]:
        """Handles of the Ray actors."""
        return tuple(self._workers)

    def evaluate(self, state: ESState) -> tuple[np.ndarray, np.ndarray]:
        """Evaluate the population.

        Args:
            state: the state that the workers have: that of the constructor, or the last given to `advance`.

        Returns:
            `(fitness, pairs)` for `EvolutionStrategy.tell`: float32 [2 S] and the int32 pairs [S] that came in time, sorted.

        Raises:
            ValueError: the workers have another generation.
            RuntimeError: every pair was late, the score failed on every member, or workers die as fast as they start.
        """
        if int(state.generation) != int(self._state.generation):
            raise ValueError(f"the workers are at generation {int(self._state.generation)}, got {int(state.generation)}.")
        num_pairs, size = self._es.population_size // 2, self._pairs_per_task
        waiting = collections.deque(range(start, min(start + size, num_pairs)) for start in range(0, num_pairs, size))
        results: dict[int, np.ndarray] = {}
        self.report, end = Report(), None if self.deadline is None else time.monotonic() + self.deadline
        while len(results) < num_pairs:
            self._hand_out(waiting)
            left = None if end is None else max(0.0, end - time.monotonic())
            done, _ = self._ray.wait(list(self._running), timeout=left)
            if not done:
                break
            self._take(done[0], int(state.generation), waiting, results)
        self.report.dropped = num_pairs - len(results)
        if not results:
            raise RuntimeError(f"no pair of generation {int(state.generation)} came within {self.deadline} seconds.")
        self._tell_of_errors(2 * len(results))
        pairs = np.array(sorted(results), np.int32)
        return np.concatenate([results[pair] for pair in pairs.tolist()]).astype(np.float32), pairs

    def _tell_of_errors(self, members: int) -> None:
        """Warn of the first error of the score, once; raise RuntimeError when every member has one."""
        errors = self.report.errors
        if len(errors) == members:
            raise RuntimeError(f"the score failed on all {members} members; the first error was {errors[0]}")
        if errors and not self._warned:
            warnings.warn(f"the score failed on {len(errors)} of {members} members: {errors[0]} (said once)", stacklevel=3)
            self._warned = True

    def _hand_out(self, waiting: collections.deque) -> None:
        """Give pairs to the workers that have none; a straggler of an earlier generation still has its own."""
        busy = {id(task.worker) for task in self._running.values()}
        for worker in self._workers:
            if waiting and id(worker) not in busy:
                pairs = waiting.popleft()
                generation = int(self._state.generation)
                self._running[worker.evaluate.remote(list(pairs))] = _Task(worker, pairs, generation)

    def _take(self, reference: Any, generation: int, waiting: collections.deque, results: dict[int, np.ndarray]) -> None:
        """Take the result of a task; the pairs of a worker that died go back."""
        task = self._running.pop(reference)
        current = task.generation == generation
        try:
            values, errors = self._ray.get(reference)
        except self._ray.exceptions.RayActorError as error:
            self.report.deaths += 1
            if self.report.deaths > MANY_DEATHS * len(self._workers):
                raise RuntimeError(f"workers die as fast as they start: {error}") from error
            if task.worker in self._workers:
                self._workers[self._workers.index(task.worker)] = self._new_worker()
            if current:
                waiting.append(task.pairs)
            return
        if current:
            results.update(zip(task.pairs, np.reshape(values, (-1, 2)), strict=True))
            self.report.errors += errors

    def advance(self, state: ESState, metrics: Metrics) -> None:
        """Tell the workers the coefficients of a generation; one that died is replaced when it is next needed.

        Args:
            state: after the generation.
            metrics: of the generation.
        """
        self._state = state
        coefficients = np.asarray(metrics.coefficients)
        for worker in self._workers:
            worker.advance.remote(int(metrics.generation), coefficients)  # actors keep the order of their calls

    def close(self) -> None:
        """Let all workers leave."""
        self.resize(0)

    def __enter__(self) -> "RemoteEvaluator":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
