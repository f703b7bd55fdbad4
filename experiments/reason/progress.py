"""What a reasoning run tells and keeps: rewards, tokens, seconds, checks on validation problems, shown completions."""

import time
import warnings
from typing import Any

import numpy as np

import eggroll
from eggroll.processes import is_first, local
from eggroll.training import Record
from experiments.reason.validation import Check, Validation


class Progress:
    """Callback of the training loop, and what a run carries beside its state (`eggroll.durable.Carried`).

    Args:
        validation: of unperturbed parameters.
        check_every: generations between checks.
        examples: completions that a check shows.
    """

    def __init__(self, validation: Validation, *, check_every: int, examples: int):
        self._validation, self._every, self._examples = validation, check_every, examples
        self.seconds, self.tokens, self.best = 0.0, 0, float("-inf")
        self.failed, self.scored = 0, False
        self.generations = 0

    def left(self, seconds: float) -> bool:
        """Whether there is time left."""
        return self.seconds < seconds

    def finish(self, generations: int) -> None:
        """Keep how many generations there were."""
        self.generations = generations

    def __call__(self, state: eggroll.ESState, record: Record) -> None:
        """Add to the record's numbers; check every now and then."""
        told, done = record.aux, record.generation + 1
        self.seconds += record.seconds
        record.extra["seconds_spent"] = self.seconds
        if told is not None:  # of several processes the first one has it
            self._tell(record, told)
        if done % self._every == 0:
            self.check(record, local(state.params))
            record.extra["held_out_fitness"] = record.extra["validation_accuracy"]  # it picks the best checkpoint

    def _tell(self, record: Record, told: Any) -> None:
        scores = told.scores
        self.tokens += told.tokens
        self.failed += scores.errors + scores.timeouts
        record.extra.update(tokens=told.tokens, tokens_per_second=told.tokens / record.seconds, ended=told.ended)
        record.extra.update(errors=scores.errors, timeouts=scores.timeouts)
        if scores.first_error and self.failed == scores.errors + scores.timeouts:
            warnings.warn(f"a reward failed and scored {scores.minimum:g}: {scores.first_error}", stacklevel=2)
        if scores.above_minimum:
            self.scored = True
        elif not self.scored and record.generation % self._every == 0:
            warnings.warn(
                f"no completion of generation {record.generation} or before scored more than {scores.minimum:g}: as long as "
                "none does there is nothing to learn from; an easier task, a better start or more room may help.",
                stacklevel=2,
            )
        if (record.generation + 1) % self._every == 0:
            show(told.examples)

    def check(self, record: Record, params: Any) -> Check:
        """Check the unperturbed parameters and tell."""
        start = time.perf_counter()
        found = self._validation(params, examples=self._examples)
        self.best = max(self.best, found.accuracy)
        record.extra.update(validation_accuracy=found.accuracy, validation_tokens=found.tokens)
        record.extra["check_seconds"] = time.perf_counter() - start
        if is_first():
            speed = record.extra.get("tokens_per_second", float("nan"))
            print(
                f"generation {record.generation + 1}: reward {record.mean_fitness:.3f}, validation {found.accuracy:.3f}, "
                f"{self.seconds:.0f} s, {speed:,.0f} tokens/s",
                flush=True,
            )
        return found

    def words(self, record: Record) -> str:
        """The changing part of the progress line."""
        checked = "" if self.best == float("-inf") else f"  validation {self.best:.3f} at best"
        speed = record.extra.get("tokens_per_second", float("nan"))
        reward = f"reward {record.mean_fitness:.3f}  best {record.best_fitness:.3f}"
        return f"{reward}{checked}  {record.members_per_second:,.0f} members/s  {speed:,.0f} tokens/s"

    def save(self) -> Any:
        """As arrays."""
        return {
            "seconds": np.array([self.seconds, self.best], np.float64),
            "counts": np.array([self.tokens, self.failed, self.scored], np.int64),
        }

    def load(self, saved: Any) -> None:
        """From arrays."""
        self.seconds, self.best = (float(value) for value in saved["seconds"])
        self.tokens, self.failed, scored = (int(value) for value in saved["counts"])
        self.scored = bool(scored)


def show(examples: list[tuple[str, str, float]]) -> None:
    """Print some completions."""
    for prompt, text, score in examples if is_first() else []:
        print(f"    {score:.2f}  {prompt}{text}".replace("\n", "\n          "), flush=True)
