"""Scores of many completions at once, by a reward that may raise, hang, kill its process or abstain.

A batch is split into calls, which worker processes make. A call that fails is repeated for each of its completions alone, so
that only those that fail on their own are lost: they score as low as any other completion of the batch, and are counted. A
completion from which the reward abstains takes the mean of its prompt: it carries no information.
"""

import asyncio
import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from eggroll.envs.tasks.calls import InvalidReward, Reward, call, check_callable, name_of, number, shorten
from eggroll.envs.tasks.protocol import Row
from eggroll.envs.tasks.rewards import check_reward, prepare
from eggroll.envs.tasks.scores import MINIMUM, Scores, fill_with_mean
from eggroll.envs.tasks.workers import Died, Pool, TimedOut, half_of_memory

CALLS_PER_WORKER = 4  # per batch: small calls, so that a slow or failed one delays or repeats little
PROBES = 32  # completions to try alone, after all calls hung or died, before the others are


class RewardFailed(RuntimeError):
    """A reward failed on every completion of a batch."""


class _Job(NamedTuple):
    """Completions of one call, with the entries of their columns."""

    prompts: list[str]
    completions: list[str]
    columns: dict[str, list]

    def part(self, items: slice) -> "_Job":
        columns = {name: column[items] for name, column in self.columns.items()}
        return _Job(self.prompts[items], self.completions[items], columns)


class _Raised(NamedTuple):
    """A reply: the reward raised."""

    text: str


@dataclasses.dataclass(frozen=True)
class _Call:
    """A reward as a function of a job: it returns scores, NaN to abstain and messages for bad numbers, as a JSON value.

    Where the reward raised it returns {"raised": text}, where it breaks the protocol {"invalid": text}.
    """

    reward: Reward

    def prepare(self) -> None:
        """Import what the reward needs."""
        prepare(self.reward)

    def accepts(self, job: _Job, reply: Any) -> bool:
        """Whether a reply can be one to the job: a process may send anything."""
        if isinstance(reply, dict):
            return len(reply) == 1 and isinstance(reply.get("raised", reply.get("invalid")), str)
        scores = isinstance(reply, list) and len(reply) == len(job.completions)
        return scores and all(isinstance(score, float | str) for score in reply)

    def __call__(self, job: _Job) -> list[float | str] | dict[str, str]:
        try:
            values = call(self.reward, job.prompts, job.completions, job.columns)
        except InvalidReward as error:
            return {"invalid": str(error)}
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            text = shorten(f"reward '{name_of(self.reward)}' raised {type(error).__name__}: {error}")
            return {"raised": text}
        return [math.nan if value is None else self._score(value) for value in values]

    def _score(self, value: Any) -> float | str:
        score = number(value)
        if math.isfinite(score):
            return score
        return shorten(f"reward '{name_of(self.reward)}' must give finite numbers, got {value!r}.")


class Scorer:
    """A reward with processes that call it; `close` it, or use it as a context manager.

    Args:
        reward: `reward(prompts=, completions=, **columns) -> list[float | None]`, also `async def`. With workers it is a
            function at the top level of a module, or another object that can be pickled. It is called with parts of a batch,
            then with each completion of a part that failed alone; it gets copies of all lists.
        workers: processes; 0: rewards are called in this one, where nothing stops one that hangs.
        timeout: seconds a call of a worker may take, of several completions or of one; None: 10.
        minimum: the score of a completion whose reward fails, unless another completion of the batch scores lower: then that.
            None: 0.
        memory: bytes that a worker may allocate; a reward that asks for more fails. None: half of the machine's memory.

    Raises:
        ValueError: `workers` is negative, `timeout` is not above 0 or has no workers to stop, `minimum` is not finite, or
            `reward` is no function.
        TypeError: `reward` cannot be sent to a worker.
    """

    def __init__(
        self,
        reward: Reward,
        *,
        workers: int = 1,
        timeout: float | None = None,
        minimum: float | None = None,
        memory: int | None = None,
    ):
        if workers < 0:
            raise ValueError(f"workers must be at least 0, got {workers}.")
        for name, value in (("timeout", timeout), ("memory", memory)):
            if value is not None and workers == 0:
                raise ValueError(f"{name} has no effect with workers=0: nothing stops a reward in this process, got {value}.")
        if memory is not None and memory < 1 << 20:
            raise ValueError(f"memory must be bytes, a MiB or more, got {memory}.")
        timeout = 10.0 if timeout is None else timeout
        if not timeout > 0:
            raise ValueError(f"timeout must be above 0 seconds, got {timeout}.")
        if minimum is not None and not math.isfinite(minimum):
            raise ValueError(f"minimum must be a finite number or None, got {minimum}.")
        check_callable(reward)
        self._call, self._timeout, self._minimum = _Call(reward), timeout, MINIMUM if minimum is None else float(minimum)
        self._checked: set[frozenset[str]] = set()  # names of columns that the reward takes
        self._warned = False
        self._calls = max(1, workers * CALLS_PER_WORKER)
        try:
            limit = half_of_memory() if memory is None else memory
            self._pool = Pool(self._call, workers=workers, timeout=timeout, memory=limit) if workers else None
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
            ValueError: lists of different lengths; the reward does not take prompts, completions and the columns by keyword, or
                gives another number of scores than there are completions.
            RewardFailed: it failed on every completion (of those that hang or die, after a sample alone); the message has the
                first error.
            RuntimeError: a worker cannot start, or the scorer is closed.
        """
        job = self._job(prompts, completions, columns)
        return self._judge(self._outcomes(job), job.prompts)

    def score_beside(
        self, prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Sequence[Any]], *, count: int
    ) -> tuple[Scores, Scores]:
        """Score a batch and, in the same call, further completions that change nothing of it.

        Args:
            prompts, completions, columns: as for a call: those of the batch, then the others.
            count: completions of the batch.

        Returns:
            The scores of the batch, as those of a call without the others; those of the others, as part of all.

        Raises:
            ValueError, RewardFailed, RuntimeError: as a call for the batch.
        """
        job = self._job(prompts, completions, columns)
        outcomes = self._outcomes(job)
        batch = self._judge(outcomes[:count], job.prompts[:count])
        return batch, self._judge(outcomes, job.prompts).part(slice(count, None))

    def _job(self, prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> _Job:
        for name, column in {"prompts": prompts, **columns}.items():
            if len(column) != len(completions):
                raise ValueError(f"{name} must have one entry per completion, {len(completions)}, got {len(column)}.")
        if frozenset(columns) not in self._checked:
            check_reward(self._call.reward, columns)
            self._checked.add(frozenset(columns))
        return _Job(list(prompts), list(completions), {name: list(column) for name, column in columns.items()})

    def _judge(self, outcomes: list, prompts: list[str]) -> Scores:
        """Make the scores of a batch out of what the reward gave for each completion."""
        failed = [outcome for outcome in outcomes if not isinstance(outcome, float)]
        first = self._text(failed[0]) if failed else None
        if failed and len(failed) == len(outcomes):
            raise RewardFailed(f"{self._name} failed on all {len(failed)} completions; the first error: {first}")
        minimum = min([self._minimum, *(own for own in outcomes if isinstance(own, float) and not math.isnan(own))])
        values = np.array([outcome if isinstance(outcome, float) else minimum for outcome in outcomes], np.float64)
        has_score = ~np.isnan(values)
        if len(values) and not has_score.any():
            self._warn_of_none(len(values))
        late = np.array([isinstance(outcome, TimedOut) for outcome in outcomes], bool)
        raised = np.array([not isinstance(outcome, float | TimedOut) for outcome in outcomes], bool)
        return Scores(fill_with_mean(values, prompts), has_score, raised, late, first, minimum)

    def try_one(self, row: Row, completion: str) -> str | None:
        """Return the error of the reward on one completion; None where it gives a score or abstains.

        Raises:
            ValueError: it gives another number of scores than one.
        """
        (outcome,) = self._outcomes(_Job([row.prompt], [completion], {name: [value] for name, value in row.columns.items()}))
        return None if isinstance(outcome, float) else self._text(outcome)

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
        replies = self._replies([job.part(part) for part in parts])
        if size > 1 and n > PROBES and all(isinstance(reply, TimedOut | Died) for reply in replies):
            self._probe(job)
        for part, reply in zip(parts, replies, strict=True):
            outcomes[part] = reply if isinstance(reply, list) else [reply if size == 1 else None] * (part.stop - part.start)
        again = [index for index, outcome in enumerate(outcomes) if outcome is None]
        alone = self._replies([job.part(slice(index, index + 1)) for index in again])
        for index, reply in zip(again, alone, strict=True):
            outcomes[index] = reply[0] if isinstance(reply, list) else reply
        return outcomes

    def _probe(self, job: _Job) -> None:
        """Raise RewardFailed if some completions alone hang or die too: to wait for each of a large batch would take hours."""
        n = len(job.completions)
        chosen = np.random.default_rng(0).permutation(n)[:PROBES].tolist()  # not evenly spaced: of all prompts
        replies = self._replies([job.part(slice(index, index + 1)) for index in chosen])
        if all(isinstance(reply, TimedOut | Died) for reply in replies):
            where = f"all {n} completions together, and on each of {PROBES} alone"
            raise RewardFailed(f"{self._name} failed on {where}; the first error: {self._text(replies[0])}")

    def _replies(self, jobs: list[_Job]) -> list:
        replies: list[Any] = self._pool.map(jobs) if self._pool else [self._call(job) for job in jobs]
        for index, reply in enumerate(replies):
            if isinstance(reply, dict) and "invalid" in reply:
                raise InvalidReward(shorten(str(reply["invalid"])))
            if isinstance(reply, dict):
                replies[index] = _Raised(shorten(str(reply["raised"])))
        return replies

    @property
    def _name(self) -> str:
        return f"reward '{name_of(self._call.reward)}'"

    def _text(self, failure: Any) -> str:
        if isinstance(failure, TimedOut):
            return f"{self._name} exceeded its time limit of {self._timeout:g} s."
        if isinstance(failure, Died):
            ended = f"ended its process with exit code {failure.exit_code}"
            return f"{self._name} {'wrote over what its process sends' if failure.exit_code is None else ended}."
        return failure.text if isinstance(failure, _Raised) else failure

    def _warn_of_none(self, completions: int) -> None:
        """Warn once of a batch without any score."""
        if not self._warned:
            warnings.warn(f"{self._name} gave None for all {completions} completions of a batch (warned once).", stacklevel=3)
            self._warned = True
