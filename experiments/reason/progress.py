"""What a reasoning run tells and keeps: rewards, tokens, seconds, checks on validation problems, shown completions."""

import math
import time
import warnings
from typing import Any, NamedTuple

import numpy as np

import eggroll
from eggroll.devices.processes import broadcast_from_first, is_first, local
from eggroll.experiments.reason.validation import Check, Validation
from eggroll.runs.training import Record


class Improved(NamedTuple):
    """What a run of either algorithm ends with."""

    params: Any
    generations: int  # steps of grpo


class Progress:
    """Callback of the training loop, and what a run carries beside its state (`eggroll.runs.durable.Carried`).

    Args:
        validation: of unperturbed parameters.
        check_every: generations between checks.
        examples: completions that a check shows.
    """

    def __init__(self, validation: Validation, *, check_every: int, examples: int):
        self._validation, self._every, self._examples = validation, check_every, examples
        self.seconds, self.best = 0.0, -math.inf  # of training; validation accuracy
        self.best_generation = 0  # whose parameters it is of, the later one of equals; 0: there was no check
        self.tokens, self.failed, self.scored = 0, 0, False  # failed rewards; whether a completion scored more than others

    def __call__(self, state: eggroll.ESState, record: Record) -> None:
        """Count a generation of the evolution; check every now and then."""
        told, due = record.aux, (record.generation + 1) % self._every == 0
        if told is None:  # of several processes only the first one scores
            self.count(record, tokens=0, failures=0)
        else:
            self.count(record, tokens=told.tokens, failures=told.scores.errors + told.scores.timeouts)
            record.extra["ended"] = told.ended
            self._warn(record, told.scores, due=due)
            show(told.examples if due else [])
        if due:
            record.extra["held_out_fitness"] = self.check(record, local(state.params)).accuracy  # it picks the best checkpoint

    def count(self, record: Record, *, tokens: int, failures: int) -> None:
        """Add seconds, tokens and failed rewards of a generation to the totals and to the record.

        Of several processes the first one's clock counts: they have to end with the same generation.
        """
        self.seconds += float(broadcast_from_first(lambda: np.asarray(record.seconds)))
        self.tokens, self.failed = self.tokens + tokens, self.failed + failures
        record.extra.update(seconds_spent=self.seconds, tokens=tokens, failed_rewards=failures)
        record.extra["tokens_per_second"] = tokens / record.seconds

    def _warn(self, record: Record, scores: Any, *, due: bool) -> None:
        failures = scores.errors + scores.timeouts
        if failures and self.failed == failures:
            warnings.warn(f"a reward failed and scored {scores.minimum:g}: {scores.first_error}", stacklevel=4)
        least = scores.values.min()  # some tasks give a little for a wrong answer
        self.scored |= bool(scores.values.max() > least)
        if due and not self.scored:
            warnings.warn(
                f"no completion until generation {record.generation + 1} scored more than {least:g}: while none does "
                "there is nothing to learn from; an easier task, a better start or more room may help.",
                stacklevel=4,
            )

    def check(self, record: Record, params: Any) -> Check:
        """Check the unperturbed parameters and tell."""
        start = time.perf_counter()
        found = self._validation(params, examples=self._examples)
        if found.accuracy >= self.best:
            self.best, self.best_generation = found.accuracy, record.generation + 1
        record.extra.update(validation_accuracy=found.accuracy, validation_tokens=found.tokens)
        record.extra["check_seconds"] = time.perf_counter() - start
        if is_first():
            speed = f"{self.seconds:.0f} s, {record.extra['tokens_per_second']:,.0f} tokens/s"
            rewards = f"reward {record.mean_fitness:.3f}, validation {found.accuracy:.3f}"
            print(f"generation {record.generation + 1}: {rewards}, {speed}", flush=True)
        show(found.examples)
        return found

    def words(self, record: Record) -> str:
        """The changing part of the progress line."""
        numbers = {
            f"reward {record.mean_fitness:.3f}": record.mean_fitness,
            f"best {record.best_fitness:.3f}": record.best_fitness,
            f"validation {self.best:.3f} at best": self.best,
            f"{record.members_per_second:,.0f} members/s": record.members_per_second,
            f"{record.extra['tokens_per_second']:,.0f} tokens/s": record.extra["tokens_per_second"],
        }
        return "  ".join(text for text, value in numbers.items() if math.isfinite(value))

    def save(self) -> Any:
        """As arrays."""
        numbers = np.array([self.seconds, self.best], np.float64)
        counts = [self.tokens, self.failed, self.scored, self.best_generation]
        return {"numbers": numbers, "counts": np.array(counts, np.int64)}

    def load(self, saved: Any) -> None:
        """From arrays."""
        self.seconds, self.best = (float(value) for value in saved["numbers"])
        self.tokens, self.failed, scored, self.best_generation = (int(value) for value in saved["counts"])
        self.scored = bool(scored)


def show(examples: list[tuple[str, str, float]]) -> None:
    """Print some completions."""
    for prompt, text, score in examples if is_first() else []:
        print(f"    {score:.2f}  {prompt}{text}".replace("\n", "\n          "), flush=True)
