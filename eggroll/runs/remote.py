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

from eggroll.noise import addresses
from eggroll.population.metrics import Metrics
from eggroll.state import ESState
from eggroll.strategy import EvolutionStrategy

MANY_DEATHS = 3  # of every worker in one generation: something else is wrong
MANY_GENERATIONS = 100  # at the same pairs: this worker does not come back
MAX_TEXT = 1000  # characters of an error
Score = Callable[[Any, jax.Array], float]  # score(params of a member, key) -> fitness, one number, higher is better


class Worker:
    """One process: the state, and members of it on demand."""

    def __init__(self, es: EvolutionStrategy, score: Score):
        self._es, self._score = es, score
        self._build: Callable = jax.jit(lambda state, index: es.ask(state).member(index))
        self._state: Any = None

    def ready(self) -> None:
        """Return once the process has started."""

    def load(self, state: Any) -> None:
        """Take a state whose key is its words: keys do not travel."""
        state = jax.tree.map(jax.numpy.asarray, state)
        self._state = state._replace(key=jax.random.wrap_key_data(state.key, impl="threefry2x32"))

    def advance(self, sigma: float, coefficients: np.ndarray) -> None:
        """Repeat the update of a generation."""
        self._state = self._es.replay(self._with(sigma), coefficients)

    def evaluate(self, updated: None, sigma: float, pairs: Sequence[int]) -> tuple[list[float], int, str]:
        """Score both members of every pair.

        Args:
            updated: the result of the last `load` or `advance`; Ray raises its error here.
            sigma: of this generation.
            pairs: their addresses.

        Returns:
            The fitness, NaN where the score raised an error; how often it did; the text of its first error.
        """
        state = self._with(sigma)
        key = jax.random.fold_in(addresses.stream_key(state.key, 1), state.generation)
        fitness, texts = [], []
        for pair in pairs:
            for index in (2 * pair, 2 * pair + 1):
                try:
                    fitness.append(float(self._score(self._build(state, index), jax.random.fold_in(key, pair))))
                except Exception as error:  # the user's code: a member that cannot be scored is the worst
                    fitness.append(float("nan"))
                    texts.append(f"{type(error).__name__}: {error}"[:MAX_TEXT])
        return fitness, len(texts), texts[0] if texts else ""

    def _with(self, sigma: float) -> ESState:
        return self._state._replace(sigma=jax.numpy.float32(sigma))


@dataclasses.dataclass
class Report:
    """What happened in the last generation."""

    dropped: int = 0  # pairs that were late
    deaths: int = 0  # workers that were lost
    failed: int = 0  # members whose score raised an error
    error: str = ""  # the first of these errors: type and message


@dataclasses.dataclass
class _Evaluation:
    """What one call of `evaluate` waits for; a later call does not look at it, so late results go nowhere."""

    generation: int
    waiting: collections.deque[range]
    results: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)  # [2] by pair
    report: Report = dataclasses.field(default_factory=Report)


class _Task(NamedTuple):
    """Pairs that a worker is at, or none while it starts."""

    worker: Any
    pairs: range = range(0)
    evaluation: _Evaluation | None = None


class RemoteEvaluator:
    """Evaluates populations on Ray workers. Ray must be initialised, or it starts on this machine.

    Args:
        es: the strategy; its plan is made.
        score: `score(params, key) -> float` of one member, any Python code; both members of a pair get the same key. A member
            on which it raises an error gets the fitness NaN; `report` has the text, and the first is warned of.
        state: the state to evaluate first.
        num_workers: processes, each with one CPU unless `resources` says otherwise; those that Ray has no room for start later.
        pairs_per_task: pairs a worker is given at a time.
        deadline: seconds of a generation after which pairs are dropped, a start of workers included; None: wait for all.
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
            _check_positive(name, value)
        self._ray, self._es, self._state = ray, es, state
        if not ray.is_initialized():
            ray.init(log_to_driver=False, include_dashboard=False)
        self._actor = ray.remote(Worker).options(**({"num_cpus": 1} | (resources or {})))
        self._arguments = ray.put(es), ray.put(score)
        self._pairs_per_task, self.deadline = pairs_per_task, deadline
        self._workers: list[Any] = []
        self._updated: dict[Any, Any] = {}  # by worker that has the state: Ray's reference to its last `load` or `advance`
        self._running: dict[Any, _Task] = {}  # by Ray's reference to the result
        self._stored: Any = None  # Ray's reference to the state
        self.report, self._warned = Report(), False
        self.resize(num_workers)

    def resize(self, num_workers: int) -> None:
        """Let workers join, with the parameters of now, or leave; ValueError for a number that is not positive."""
        _check_positive("num_workers", num_workers)
        while len(self._workers) > num_workers:
            self._remove(self._workers[-1])
        while len(self._workers) < num_workers:
            self._add()

    def _add(self) -> None:
        worker: Any = self._actor.remote(*self._arguments)
        self._workers.append(worker)
        self._running[worker.ready.remote()] = _Task(worker)

    def _remove(self, worker: Any) -> None:
        self._workers.remove(worker)
        self._updated.pop(worker, None)
        self._running = {reference: task for reference, task in self._running.items() if task.worker != worker}
        self._ray.kill(worker)

    def _replace(self, worker: Any) -> None:
        self.report.deaths += 1
        self._remove(worker)
        self._add()

    @property
    def workers(self) -> tuple[Any, ...]:
        """Handles of the Ray actors."""
        return tuple(self._workers)

    def evaluate(self, state: ESState) -> tuple[np.ndarray, np.ndarray]:
        """Evaluate the population.

        Args:
            state: the state that the workers have: that of the constructor, or the last given to `advance`; sigma may differ.

        Returns:
            `(fitness, pairs)` for `EvolutionStrategy.tell`: float32 [2 S] and the int32 pairs [S] that came in time, sorted.

        Raises:
            ValueError: the workers have another generation.
            RuntimeError: every pair was late, the score failed on every member, workers die as fast as they start, or all left.
        """
        generation, sigma = int(state.generation), float(state.sigma)
        if generation != int(self._state.generation):
            raise ValueError(f"the workers are at generation {int(self._state.generation)}, got {generation}.")
        if not self._workers:
            raise RuntimeError("the workers have left: this evaluator is closed.")
        num_pairs, size = self._es.population_size // 2, self._pairs_per_task
        now = _Evaluation(generation, collections.deque(range(num_pairs)[at : at + size] for at in range(0, num_pairs, size)))
        self.report, results = now.report, now.results
        end = float("inf") if self.deadline is None else time.monotonic() + self.deadline
        while len(results) < num_pairs:
            left = end - time.monotonic()
            if left > 0:
                self._hand_out(now, sigma)
            done, _ = self._ray.wait(list(self._running), timeout=None if self.deadline is None else max(0.0, left))
            if not done:
                break
            self._take(done[0], now)
        now.report.dropped = num_pairs - len(results)
        if not results:
            raise RuntimeError(f"no pair of generation {generation} came within {self.deadline} seconds.")
        self._tell_of_errors(2 * len(results))
        pairs = np.array(sorted(results), np.int32)
        return np.concatenate([results[pair] for pair in pairs.tolist()]).astype(np.float32), pairs

    def _tell_of_errors(self, members: int) -> None:
        """Warn of the first error of the score, once; raise RuntimeError when every member has one."""
        failed, error = self.report.failed, self.report.error
        if failed == members:
            raise RuntimeError(f"the score failed on all {members} members; the first error was {error}")
        if failed and not self._warned:
            warnings.warn(f"the score failed on {failed} of {members} members: {error} (said once)", stacklevel=3)
            self._warned = True

    def _hand_out(self, now: _Evaluation, sigma: float) -> None:
        """Give pairs to the workers that have none; a straggler of an earlier generation still has its own."""
        busy = {task.worker for task in self._running.values()}
        for worker, updated in self._updated.items():
            if now.waiting and worker not in busy:
                pairs = now.waiting.popleft()
                self._running[worker.evaluate.remote(updated, sigma, list(pairs))] = _Task(worker, pairs, now)

    def _take(self, reference: Any, now: _Evaluation) -> None:
        """Take the result of a task; the pairs of a worker that died go back."""
        worker, pairs, evaluation = self._running.pop(reference)
        try:
            result = self._ray.get(reference)
        except self._ray.exceptions.RayActorError as error:
            self._replace(worker)
            if now.report.deaths > MANY_DEATHS * len(self._workers):
                raise RuntimeError(f"workers die as fast as they start: {error}") from error
            if evaluation is not None:
                evaluation.waiting.append(pairs)
            return
        if evaluation is None:
            self._updated[worker] = worker.load.remote(self._state_of_now())
        else:
            values, failed, text = result
            evaluation.results.update(zip(pairs, np.reshape(values, (-1, 2)), strict=True))
            evaluation.report.failed += failed
            evaluation.report.error = evaluation.report.error or text

    def _state_of_now(self) -> Any:
        """Ray's reference to the state on the host, its key as words; stored once a generation."""
        if self._stored is None:
            self._stored = self._ray.put(jax.device_get(self._state._replace(key=jax.random.key_data(self._state.key))))
        return self._stored

    def advance(self, state: ESState, metrics: Metrics) -> None:
        """Tell the workers the coefficients of a generation; one that starts or is replaced gets the state instead.

        Args:
            state: after the generation.
            metrics: of the generation.

        Raises:
            ValueError: the metrics are not of the generation that the workers are at, or the state is not the next.
        """
        before, done, after = (int(x) for x in (self._state.generation, metrics.generation, state.generation))
        if (done, after) != (before, before + 1):
            raise ValueError(f"the workers are at generation {before}, got metrics of {done} and a state of {after}.")
        self._state, self._stored = state, None
        for worker, _, evaluation in list(self._running.values()):
            if evaluation is not None and before - evaluation.generation >= MANY_GENERATIONS:
                self._replace(worker)
        coefficients = self._ray.put(np.asarray(metrics.coefficients))
        for worker in self._updated:  # actors keep the order of their calls
            self._updated[worker] = worker.advance.remote(float(metrics.sigma), coefficients)

    def close(self) -> None:
        """Let all workers leave, whatever they are at."""
        while self._workers:
            self._remove(self._workers[-1])

    def __enter__(self) -> "RemoteEvaluator":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _check_positive(name: str, value: float | None) -> None:
    if value is not None and not value > 0:
        raise ValueError(f"{name} must be positive, got {value!r}.")
