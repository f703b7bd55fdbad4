"""Progress of a run: loss and projected gradient of every step, scores on the validation examples, why it ended."""

import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from eggroll.devices.processes import is_first
from eggroll.experiments.common.loop import Checks, print_end
from eggroll.experiments.zo.config import Config
from eggroll.experiments.zo.figure import as_row
from eggroll.experiments.zo.problem import Score
from eggroll.runs.training import Record

GROWING = 10  # steps in a row whose losses grow, before a warning


class Progress:
    """Callback of the training loop; its count is stored with the state of a run (`eggroll.runs.carried.Carried`).

    The seconds are in the metrics: a checkpoint of an earlier version has the count alone.

    Args:
        score: of the validation examples, from a state.
        checks: when to score.
        learning_rate: of the run, for advice; None: a schedule.
        signs: forwards of a direction, 2 or 1, whose losses are the fitness of a step; None: a step has no directions.
        forwards: of a step.
    """

    def __init__(
        self,
        score: Callable[[Any], Score],
        checks: Checks,
        *,
        learning_rate: float | None,
        signs: int | None = None,
        forwards: int = 1,
    ):
        self.skipped = 0
        self.suggested = math.nan  # learning rate, where one was measured
        self._score, self._checks, self._learning_rate = score, checks, learning_rate
        self._signs, self._forwards = signs, forwards
        self._validation = ""
        self._losses: list[float] = []  # of the last steps, each above the one before
        self._has_warned = False
        self.begin()

    def begin(self, spent: float = 0.0) -> None:
        """Start the clock, with the seconds that training took before it was resumed."""
        self._start = time.perf_counter() - spent

    @property
    def seconds(self) -> float:
        """Of training, checks and compilation included."""
        return time.perf_counter() - self._start

    def __call__(self, state: Any, record: Record) -> None:
        """Take the numbers of a step into its line of metrics; score when that is due."""
        loss, done = -record.mean_fitness, record.generation + 1
        self.skipped += record.skipped
        record.extra.update(loss=loss, steps=done, seconds_spent=self.seconds)
        if self._signs is not None:
            record.extra["projected_gradient"] = projected_gradient(record.fitness, sigma=record.sigma, signs=self._signs)
        self._warn_of_growth(loss, done)
        if self._checks.due(done):
            found = self._score(state)
            record.extra.update(as_row(found))
            self._validation = f"  validation {words(found)}"
            if is_first():
                print(f"step {done}: training loss {loss:.4g}, validation {words(found)}, {self.seconds:.0f} s", flush=True)

    def _warn_of_growth(self, loss: float, done: int) -> None:
        grows = bool(self._losses) and loss > self._losses[-1]
        self._losses = [*self._losses, loss] if grows else [loss]
        if len(self._losses) <= GROWING or self._has_warned:
            return
        first, self._has_warned = self._losses[0], True
        rate = self._learning_rate
        advice = "too high" if rate is None else f"too high, try --learning-rate {self._lower(rate):.1g} instead of {rate:g}"
        grew = f"the loss grew in {GROWING} steps in a row, from {first:.4g} to {loss:.4g} after step {done}"
        warnings.warn(f"{grew}: the learning rate is {advice}.", stacklevel=4)

    def _lower(self, rate: float) -> float:
        """A tenth of a learning rate, or less where less was suggested."""
        return min(rate / 10, self.suggested) if math.isfinite(self.suggested) else rate / 10

    def words(self, record: Record) -> str:
        """Return the changing part of the progress line."""
        gradient = record.extra.get("projected_gradient", math.nan)
        middle = f"  projected gradient {gradient:.3g}" if math.isfinite(gradient) else ""
        speed = f"  {self._forwards / record.seconds:.3g} forwards/s"
        return f"loss {record.extra['loss']:.4g}{middle}{self._validation}{speed}"

    def save(self) -> Any:
        """Return the count as an array."""
        return np.array([self.skipped], np.int64)

    def load(self, saved: Any) -> None:
        """Restore."""
        self.skipped = int(saved[0])


def projected_gradient(fitness: Any, *, sigma: float, signs: int) -> float:
    """Return the root mean square of (l+ - l-) / (2 sigma) over the directions of a step, or of (l+ - l_0) / sigma.

    Args:
        fitness: [2 n], minus the losses, l+ and the other one of a direction next to each other.
        sigma: of the perturbation.
        signs: 2 where the other one is l-, 1 where it is l_0.
    """
    losses = np.asarray(fitness, np.float64).reshape(-1, 2)
    with np.errstate(invalid="ignore"):  # of losses that are not finite
        return float(np.sqrt(np.mean(((losses[:, 0] - losses[:, 1]) / (signs * sigma)) ** 2)))


def words(score: Score) -> str:
    """Return a score as text."""
    return f"loss {score.loss:.4g} accuracy {score.accuracy:.3f}"


def why_ended(config: Config, steps: int, *, forwards: int, seconds: float) -> str:
    """Return which limit ended a run after some steps, "steps" or "forwards", and print it; `forwards` are of a step."""
    limit = "forwards" if config.steps is None else "steps"
    spent = "are done" if limit == "steps" else f"leave no other of {forwards}"
    print_end(f"{steps} steps ({steps * forwards} forwards)", f"--{limit} {getattr(config, limit)} {spent}", seconds=seconds)
    return limit
