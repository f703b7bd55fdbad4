"""`--probe`: before a run, a minute of measurements that say which sigma and which step size suit the model and the task.

    sigma      members answer the same problems as the unperturbed model, at one sigma after the other
    step size  the first step that Adam makes from one of these generations, at several lengths, on held-out problems

`recommendation` has the rules. A probe measures what a perturbation and a step change; whether the model then learns, only a
run shows. Nothing is written.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from eggroll.experiments.common.suite import markdown_table
from eggroll.experiments.reason.config import Config
from eggroll.experiments.reason.evolution import Evolution
from eggroll.experiments.reason.measure.recommendation import KEPT, SigmaRow, StepRow, choose_sigma, fits
from eggroll.experiments.reason.problem import Problem, Sampling, Validation

SECONDS, FOR_SIGMA = 60.0, 0.6  # of a probe, and the share of them that sigma gets
MEMBERS, GROUP = 32, 8  # groups have problems of their own
HELD_OUT = 64  # problems after a step
UP, DOWN = (3.0, 10.0, 30.0), (1 / 3, 1 / 10, 1 / 30, 1 / 100)  # times the value that the options have
Measured = TypeVar("Measured", SigmaRow, StepRow)


def probe(config: Config, problem: Problem, sampling: Sampling) -> dict[str, Any]:
    """Measure sigma and step size, print tables and advice, and return the summary.

    Args:
        config: of the run to come; `seconds` bound the probe, which ends after the measurement that reaches them.
        problem: the model and the task.
        sampling: of the completions.
    """
    start = time.perf_counter()

    def has_time(share: float, took: float) -> bool:
        return time.perf_counter() - start + took <= share * (config.seconds or SECONDS)

    members = _Members(config, problem, sampling)
    in_time = functools.partial(has_time, FOR_SIGMA)
    sigmas = walk(members.measure, config.sigma, good=_keeps_reward, has_time=in_time)
    print(f"unperturbed reward {members.reward:.3f} on {members.problems} problems of the train split", flush=True)
    print(_table(sigmas), flush=True)
    sigma, words = choose_sigma(sigmas)
    print(words, flush=True)
    steps: list[StepRow] = []
    if sigma is not None and _is_measurable(config):
        step = _Step(config, problem, sampling, *members.step(sigma))
        print(f"held-out reward {step.reward:.3f} before a step from {members.size} members at sigma {sigma:g}", flush=True)
        steps = walk(step.measure, config.learning_rate, good=fits, has_time=functools.partial(has_time, 1.0))
        print(_table(steps), flush=True)
    rate = max((row.learning_rate for row in steps if fits(row)), default=None)
    if sigma is not None:
        print(f"try: {_options(config, sigma, rate)}", flush=True)
    return {
        "sigma": sigma,
        "learning_rate": rate,
        "unperturbed_reward": members.reward,
        "sigmas": [row._asdict() for row in sigmas],
        "steps": [row._asdict() for row in steps],
        "advice": words,
        "seconds": round(time.perf_counter() - start, 1),
    }


def walk(
    measure: Callable[[float], Measured], first: float, *, good: Callable[[Measured], bool], has_time: Callable[[float], bool]
) -> list[Measured]:
    """Measure a value, larger ones while they are good, or smaller ones until one is; then one between the last two.

    Args:
        measure: the row of a value.
        first: is measured in any case; the others are it times `UP` or `DOWN`, rounded to one digit.
        good: whether a row could be recommended.
        has_time: for another measurement, given the seconds that the last one took.
    """
    rows, took = [measure(first)], 0.0  # the first one compiles
    was_good = good(rows[0])

    def next_row(value: float) -> None:
        nonlocal took
        start = time.perf_counter()
        rows.append(measure(value))
        took = time.perf_counter() - start

    for factor in UP if was_good else DOWN:
        if not has_time(took):
            break
        next_row(float(f"{first * factor:.0e}"))
        if good(rows[-1]) != was_good:
            break
    if good(rows[-1]) != was_good and has_time(took):
        next_row(float(f"{math.sqrt(rows[-1][0] * rows[-2][0]):.1e}"))
    return sorted(rows)


def _keeps_reward(row: SigmaRow) -> bool:
    return not row.kept < KEPT and row.texts_changed < 0.99  # NaN, of a model without reward, has nothing to lose


def _is_measurable(config: Config) -> bool:
    if config.optimizer == "adam" and config.weights == "float" and config.dtype == "float32":
        return True
    print("The step size is measured for Adam on float32 parameters only.", flush=True)
    return False


def _options(config: Config, sigma: float, rate: float | None) -> str:
    found = f"--sigma {sigma:g}" + ("" if rate is None else f" --learning-rate {rate:g}")
    return found + (f" --int8.sigma {config.int8.sigma * sigma / config.sigma:g}" if config.weights == "int8" else "")


def _table(rows: Sequence[SigmaRow] | Sequence[StepRow]) -> str:
    head = [name.replace("_", " ") for name in rows[0]._fields]
    cells = [[f"{value:.3g}" if isinstance(value, float) else str(value).lower() for value in row] for row in rows]
    return markdown_table(head, cells)


class _Members:
    """A population on one batch of problems, at any sigma."""

    def __init__(self, config: Config, problem: Problem, sampling: Sampling):
        self.size = min(config.population_size, MEMBERS)
        groups = self.size // GROUP if self.size % GROUP == 0 else 1
        groups = groups if groups * config.prompts <= len(problem.task.split("train")) else 1
        small = dataclasses.replace(config, population_size=self.size, group=self.size // groups, seeds=1)
        evolution = Evolution(small, problem, sampling)
        self.problems, self._strategy = groups * config.prompts, evolution.strategy
        self._questions, self._state = evolution.questions(0, seed=config.seed), evolution.start(seed=config.seed)
        self._unperturbed = jax.device_get(evolution.strategy.complete(problem.params, self._questions.inputs))
        self._fitness: dict[float, np.ndarray] = {}  # by sigma
        self.reward = math.nan  # of the unperturbed model, once a sigma was measured

    def measure(self, sigma: float) -> SigmaRow:
        """Evaluate the members at a sigma."""
        strategy, (inputs, rows) = self._strategy, self._questions
        population = strategy.es.ask(self._state._replace(sigma=jnp.float32(sigma)))
        outputs = jax.device_get(population.apply(strategy.function, inputs))
        fitness, report = strategy.score(outputs, rows, self._unperturbed)
        self._fitness[sigma], found = fitness, report.comparison
        self.reward = float(found.unperturbed.mean())
        means = fitness.mean(axis=1)
        tied = float((means[0::2] == means[1::2]).mean())
        return SigmaRow(
            sigma, found.texts_changed, tied, float(found.members.mean()), found.kept, found.kept_error, found.has_signal
        )

    def step(self, sigma: float) -> tuple[Any, float, float]:
        """Return the parameters after the generation of a sigma that was measured, and its step over sigma and the weights."""
        state, metrics = self._strategy.es.tell(self._state._replace(sigma=jnp.float32(sigma)), self._fitness[sigma])
        return state.params, float(metrics.update_over_sigma), float(metrics.update_over_weights)


class _Step:
    """A step from the parameters of a problem, at any length, on held-out problems."""

    def __init__(
        self, config: Config, problem: Problem, sampling: Sampling, after: Any, over_sigma: float, over_weights: float
    ):
        size = min(config.validation_size, HELD_OUT)
        self._validation = Validation(problem, "validation", size=size, sampling=sampling)
        self._before, self._after, self._rate = problem.params, after, config.learning_rate
        self._over_sigma, self._over_weights = over_sigma, over_weights
        self._texts, scores = self._validation.score(self._validation.complete(self._before))
        self._scores = scores.values
        self.reward = float(self._scores.mean())

    def measure(self, learning_rate: float) -> StepRow:
        """Make the step with another step size."""
        times = learning_rate / self._rate
        completions = self._validation.complete(_move(self._before, self._after, jnp.float32(times)))
        texts, scores = self._validation.score(completions)
        gained = scores.values - self._scores
        error = gained.std(ddof=1) / math.sqrt(len(gained)) if len(gained) > 1 else math.inf
        return StepRow(
            learning_rate,
            times * self._over_sigma,
            times * self._over_weights,
            float(np.mean([text != before for text, before in zip(texts, self._texts, strict=True)])),
            float(scores.values.mean()),
            bool(gained.mean() < -2 * error),
        )


@jax.jit
def _move(before: Any, after: Any, times: Any) -> Any:
    return jax.tree.map(lambda a, b: a + times * (b - a), before, after)
