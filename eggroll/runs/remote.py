"""Fitness computed by Python code on many machines, through Ray: member addresses are sent out, scalars come back.

    with RemoteEvaluator(es, score, state, num_workers=8, deadline=60) as workers:
        for generation in range(100):
            fitness, pairs = workers.evaluate(state)
            state, metrics = es.tell(state, fitness, pairs=pairs)
            workers.advance(state, metrics)

Every worker holds the parameters, builds members from their addresses and calls `score(params, key)`. After a generation it
gets the coefficients and repeats the update. Dead workers are replaced; late pairs are dropped: the estimate stays unbiased.
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
from eggroll.plans import adopt_plans, plans_of
from eggroll.population.metrics import Metrics
from eggroll.protocol import AskTell, State

MANY_DEATHS = 3  # per worker and generation: above this the cause is not the machines
MANY_GENERATIONS = 100  # spent on the same pairs: above this the worker is considered lost
MAX_TEXT = 1000  # characters of an error
Score = Callable[[Any, jax.Array], float]  # (params of a member, key) -> fitness, higher is better


class Worker:
    """One process: holds the state, builds and scores members on demand."""

    def __init__(self, es: AskTell, plans: list, score: Score):
        adopt_plans(es, plans)
        self._es, self._score = es, score
        self._build: Callable = jax.jit(lambda state, index: es.ask(state).member(index))
        self._state: Any = None

    def ready(self) -> None:
        """Return once the process has started."""

    def load(self, state: Any) -> None:
        """Take a state whose key is given as its words: typed keys cannot be serialised."""
        state = jax.tree.map(jax.numpy.asarray, state)
        self._state = state._replace(key=jax.random.wrap_key_data(state.key, impl="threefry2x32"))

    def advance(self, sigma: float, coefficients: np.ndarray, mean_fitness: float) -> None:
        """Repeat the update of a generation."""
        self._state = self._es.replay(self._with(sigma), coefficients, mean_fitness=mean_fitness)

    def evaluate(self, updated: None, sigma: float, pairs: Sequence[int]) -> tuple[list[float], int, str]:
        """Score both members of every pair.

        Args:
            updated: the result of the last `load` or `advance`, whose error Ray raises here.
            sigma: of this generation.
            pairs: indices of the pairs.

        Returns:
            The fitness, NaN where the score raised an error; the number of errors; the text of the first error.
        """
        state = self._with(sigma)
        key = jax.random.fold_in(addresses.stream_key(state.key, 1), state.generation)
        fitness, texts = [], []
        for pair in pairs:
            for index in (2 * pair, 2 * pair + 1):
                try:
                    fitness.append(float(self._score(self._build(state, index), jax.random.fold_in(key, pair))))
                except Exception as error:  # the user's code: a member that cannot be scored ranks worst
                    fitness.append(float("nan"))
                    texts.append(f"{type(error).__name__}: {error}"[:MAX_TEXT])
        return fitness, len(texts), texts[0] if texts else ""

    def _with(self, sigma: float) -> Any:
        return self._state._replace(sigma=jax.numpy.float32(sigma))


@dataclasses.dataclass
class Report:
    """What happened in the last generation."""

    dropped: int = 0  # late pairs
    deaths: int = 0  # lost workers
    failed: int = 0  # members whose score raised an error
    error: str = ""  # the first of these errors: type and message


@dataclasses.dataclass
class _Evaluation:
    """The work of one call of `evaluate`; later calls ignore it, so late results are discarded."""

    generation: int
    waiting: collections.deque[range]
    results: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)  # [2] by pair
    report: Report = dataclasses.field(default_factory=Report)


class _Task(NamedTuple):
    """The pairs a worker is evaluating; none while it starts."""

    worker: Any
    pairs: range = range(0)
    evaluation: _Evaluation | None = None


class RemoteEvaluator:
    """Evaluates populations on Ray workers. Ray must be initialised, or it starts on this machine.

    Args:
        es: the strategy, with its plan.
        score: `score(params, key) -> float` of one member; both members of a pair get the same key. One whose score raises an
            error gets the fitness NaN; `report` has the text, and the first error is a warning.
        state: the state to evaluate first.
        num_workers: processes, each with one CPU by default (see `resources`).
        pairs_per_task: pairs a worker gets at a time.
        deadline: seconds per generation, start-up of workers included, after which pairs are dropped; None: wait for all.
        resources: options of Ray actors, such as {"num_gpus": 1}.

    Raises:
        ModuleNotFoundError: ray is not installed.
        ValueError: a number is not positive.
    """

    def __init__(
        self,
        es: AskTell,
        score: Score,
        state: State,
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
        self._arguments = ray.put(es.on_one_device()), ray.put(plans_of(es)), ray.put(score)
        self._pairs_per_task, self.deadline = pairs_per_task, deadline
        self._workers: list[Any] = []
        self._updated: dict[Any, Any] = {}  # by worker that has the state: Ray's reference to its last `load` or `advance`
        self._running: dict[Any, _Task] = {}  # by Ray's reference to the result
        self._stored: Any = None  # Ray's reference to the state
        self.report, self._warned = Report(), False
        self.resize(num_workers)

    def resize(self, num_workers: int) -> None:
        """Add workers, with the current parameters, or remove some; ValueError for a number that is not positive."""
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

    def evaluate(self, state: State) -> tuple[np.ndarray, np.ndarray]:
        """Evaluate the population.

        Args:
            state: that of the constructor, or the last given to `advance`; sigma may differ.

        Returns:
            `(fitness, pairs)` for `EvolutionStrategy.tell`: float64 [2 S], and the int32 pairs [S] that were in time, sorted.

        Raises:
            ValueError: the workers are at another generation.
            RuntimeError: every pair was late, the score failed on all members, all workers die, or the evaluator is closed.
        """
        generation, sigma = int(state.generation), float(state.sigma)
        if generation != int(self._state.generation):
            raise ValueError(f"the workers are at generation {int(self._state.generation)}, got {generation}.")
        if not self._workers:
            raise RuntimeError("there are no workers: this evaluator is closed.")
        num_pairs, size = self._es.population_size // 2, self._pairs_per_task
        now = _Evaluation(generation, collections.deque(range(num_pairs)[at : at + size] for at in range(0, num_pairs, size)))
        self.report, results = now.report, now.results
        end = float("inf") if self.deadline is None else time.monotonic() + self.deadline
        while len(results) < num_pairs:
            left = end - time.monotonic()
            if left > 0:
                self._assign(now, sigma)
            done, _ = self._ray.wait(list(self._running), timeout=None if self.deadline is None else max(0.0, left))
            if not done:
                break
            self._collect(done[0], now)
        now.report.dropped = num_pairs - len(results)
        if not results:
            raise RuntimeError(f"no pair of generation {generation} came within {self.deadline} seconds.")
        self._report_errors(2 * len(results))
        pairs = np.array(sorted(results), np.int32)
        return np.concatenate([results[pair] for pair in pairs.tolist()]).astype(np.float64), pairs

    def _report_errors(self, members: int) -> None:
        """Warn of the first error of the score, once; raise RuntimeError when it failed on every member."""
        failed, error = self.report.failed, self.report.error
        if failed == members:
            raise RuntimeError(f"the score failed on all {members} members; the first error was {error}")
        if failed and not self._warned:
            warnings.warn(f"the score failed on {failed} of {members} members: {error} (warned once)", stacklevel=3)
            self._warned = True

    def _assign(self, now: _Evaluation, sigma: float) -> None:
        """Give pairs to idle workers; a straggler of an earlier generation is still busy."""
        busy = {task.worker for task in self._running.values()}
        for worker, updated in self._updated.items():
            if now.waiting and worker not in busy:
                pairs = now.waiting.popleft()
                self._running[worker.evaluate.remote(updated, sigma, list(pairs))] = _Task(worker, pairs, now)

    def _collect(self, reference: Any, now: _Evaluation) -> None:
        """Store the result of a task; the pairs of a dead worker are queued again."""
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
            self._updated[worker] = worker.load.remote(self._put_state())
        else:
            values, failed, text = result
            evaluation.results.update(zip(pairs, np.reshape(values, (-1, 2)), strict=True))
            evaluation.report.failed += failed
            evaluation.report.error = evaluation.report.error or text

    def _put_state(self) -> Any:
        """Ray's reference to the state on the host, with its key as words; stored once per generation."""
        if self._stored is None:
            self._stored = self._ray.put(jax.device_get(self._state._replace(key=jax.random.key_data(self._state.key))))
        return self._stored

    def advance(self, state: State, metrics: Metrics) -> None:
        """Send the coefficients of a generation to the workers; new workers get the state instead.

        Args:
            state: after the generation.
            metrics: of the generation.

        Raises:
            ValueError: the metrics are not of the workers' generation, or the state is not the next one.
        """
        before, done, after = (int(x) for x in (self._state.generation, metrics.generation, state.generation))
        if (done, after) != (before, before + 1):
            raise ValueError(f"the workers are at generation {before}, got metrics of {done} and a state of {after}.")
        self._state, self._stored = state, None
        for worker, _, evaluation in list(self._running.values()):
            if evaluation is not None and before - evaluation.generation >= MANY_GENERATIONS:
                self._replace(worker)
        scalars = float(metrics.sigma), self._ray.put(np.asarray(metrics.coefficients)), float(metrics.mean_fitness)
        for worker in self._updated:  # actors keep the order of their calls
            self._updated[worker] = worker.advance.remote(*scalars)

    def close(self) -> None:
        """Stop all workers, even busy ones."""
        while self._workers:
            self._remove(self._workers[-1])

    def __enter__(self) -> "RemoteEvaluator":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _check_positive(name: str, value: float | None) -> None:
    if value is not None and not value > 0:
        raise ValueError(f"{name} must be positive, got {value!r}.")
