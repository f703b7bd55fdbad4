"""Scores of many completions at once, by a reward that may raise, hang or kill its process.

A batch is split into calls, which worker processes make. A call that fails is repeated for each of its completions alone, so
that only those that fail on their own are lost: they score the minimum and are counted.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from eggroll.envs.tasks.protocol import Reward, name_of
from eggroll.envs.tasks.rewards import InvalidReward, checked
from eggroll.envs.tasks.workers import Died, Pool, TimedOut

MINIMUM = 0.0  # score of a completion whose reward failed
CALLS_PER_WORKER = 4  # per batch: small calls, so that a slow or failed one delays or repeats little


class Scores(NamedTuple):
    """Scores of a batch."""

    values: np.ndarray  # float64 [completions], finite
    errors: int  # completions whose reward raised, killed its process or gave no finite number
    timeouts: int  # completions whose reward exceeded the time limit
    first_error: str | None  # description of the first of either
    minimum: float  # their score


class _Job(NamedTuple):
    """Completions of one call, with the entries of their columns."""

    prompts: list[str]
    completions: list[str]
    columns: dict[str, list]

    def part(self, items: slice) -> "_Job":
        return _Job(
            self.prompts[items], self.completions[items], {name: column[items] for name, column in self.columns.items()}
        )


class _Raised(NamedTuple):
    """A call's reply: the reward raised."""

    text: str
    invalid: bool  # it breaks the protocol, whatever the completion


@dataclasses.dataclass(frozen=True)
class _Call:
    """A reward as a function of a job: it returns scores, messages for those that are not finite, or `_Raised`."""

    reward: Reward

    def __call__(self, job: _Job) -> "list[float | str] | _Raised":
        try:
            values = checked(self.reward, job.prompts, job.completions, **job.columns)
        except InvalidReward as error:
            return _Raised(str(error), invalid=True)
        except (Exception, SystemExit) as error:
            return _Raised(f"reward '{name_of(self.reward)}' raised {type(error).__name__}: {error}", invalid=False)
        return [self._score(value) for value in values]

    def _score(self, value: Any) -> float | str:
        try:
            score = float(value) if not isinstance(value, str | bytes) else math.nan
        except (TypeError, ValueError, OverflowError):
            score = math.nan
        return score if math.isfinite(score) else f"reward '{name_of(self.reward)}' must give finite numbers, got {value!r}."


class Scorer:
    """A reward with processes that call it; `close` it, or use it as a context manager.

    Args:
        reward: `reward(prompts, completions, **columns) -> list[float]`. With workers it is a function at the top level of a
            module, or another object that can be pickled. It is called with parts of a batch, then with each completion of a
            part that failed alone.
        workers: processes; 0: rewards are called in this one, where nothing stops one that hangs.
        timeout: seconds a call may take, of several completions or of one.
        minimum: the score of a completion whose reward fails.

    Raises:
        ValueError: `workers` is negative, `timeout` is not above 0, or `minimum` is not finite.
        TypeError: `reward` cannot be sent to a worker.
    """

    def __init__(self, reward: Reward, *, workers: int = 1, timeout: float = 10.0, minimum: float = MINIMUM):
        if workers < 0:
            raise ValueError(f"workers must be at least 0, got {workers}.")
        if not timeout > 0:
            raise ValueError(f"timeout must be above 0 seconds, got {timeout}.")
        if not math.isfinite(minimum):
            raise ValueError(f"minimum must be a finite number, got {minimum}.")
        self._call, self._timeout, self._minimum = _Call(reward), timeout, minimum
        self._calls = max(1, workers * CALLS_PER_WORKER)
        try:
            self._pool = Pool(self._call, workers=workers, timeout=timeout) if workers else None
        except TypeError as error:
            raise TypeError(
                f"reward '{name_of(reward)}' must be a function at the top level of a module, but {error};"
                " workers=0 takes any, and calls it in this process."
            ) from None

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        """Score a batch.

        Args:
            prompts: one per completion.
            completions: texts.
            columns: one entry per completion each.

        Returns:
            The scores.

        Raises:
            ValueError: lists of different lengths; the reward gives another number of scores than there are completions.
            RuntimeError: a worker cannot start, or the scorer is closed.
        """
        for name, column in {"prompts": prompts, **columns}.items():
            if len(column) != len(completions):
                raise ValueError(f"{name} must have one entry per completion, {len(completions)}, got {len(column)}.")
        job = _Job(list(prompts), list(completions), {name: list(column) for name, column in columns.items()})
        outcomes = self._outcomes(job)
        failed = [outcome for outcome in outcomes if not isinstance(outcome, float)]
        timeouts = sum(isinstance(outcome, TimedOut) for outcome in failed)
        values = [outcome if isinstance(outcome, float) else self._minimum for outcome in outcomes]
        first = self._text(failed[0]) if failed else None
        return Scores(np.array(values, np.float64), len(failed) - timeouts, timeouts, first, self._minimum)

    def close(self) -> None:
        """End the processes."""
        if self._pool:
            self._pool.close()

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _outcomes(self, job: _Job) -> list:
        """Return a score or a failure per completion: first in calls of several, then alone if that call failed."""
        n = len(job.completions)
        size = -(-n // self._calls)
        parts = [slice(first, min(first + size, n)) for first in range(0, n, max(size, 1))]
        outcomes: list[Any] = [None] * n
        for part, reply in zip(parts, self._replies([job.part(part) for part in parts]), strict=True):
            outcomes[part] = reply if isinstance(reply, list) else [reply if size == 1 else None] * (part.stop - part.start)
        again = [index for index, outcome in enumerate(outcomes) if outcome is None]
        alone = self._replies([job.part(slice(index, index + 1)) for index in again])
        for index, reply in zip(again, alone, strict=True):
            outcomes[index] = reply[0] if isinstance(reply, list) else reply
        return outcomes

    def _replies(self, jobs: list[_Job]) -> list:
        replies = self._pool.map(jobs) if self._pool else [self._call(job) for job in jobs]
        for reply in replies:
            if isinstance(reply, _Raised) and reply.invalid:
                raise ValueError(reply.text)
        return replies

    def _text(self, failure: Any) -> str:
        if isinstance(failure, TimedOut):
            return f"reward '{name_of(self._call.reward)}' exceeded its time limit of {self._timeout:g} s."
        if isinstance(failure, Died):
            return f"reward '{name_of(self._call.reward)}' ended its process with exit code {failure.exit_code}."
        return failure.text if isinstance(failure, _Raised) else failure
