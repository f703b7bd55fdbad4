"""Progress of a reasoning run: rewards, tokens, seconds, checks on validation problems, printed completions."""

import math
import time
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

import eggroll
from eggroll.devices.processes import broadcast_from_first, is_first, local
from eggroll.envs import tasks
from eggroll.experiments.reason.problem import Check, Validation
from eggroll.runs.training import Record


class Improved(NamedTuple):
    """The result of a run of either algorithm."""

    params: Any
    generations: int  # steps of grpo
    advice: str = ""  # what to change, should nothing have been learned


class Report(NamedTuple):
    """The completions of a generation, for the metrics: its aux."""

    tokens: int  # of all completions
    ended: float  # share of completions that a stop token ended
    scores: tasks.Scores
    examples: list[tuple[str, str, float]]  # prompt, completion, score
    extra: Mapping[str, float]  # further metrics of the algorithm


class Progress:
    """Callback of the training loop; its counts are stored with the state of a run (`eggroll.runs.durable.Carried`).

    Args:
        validation: of unperturbed parameters.
        check_every: generations between checks.
        examples: completions that a check prints.
    """

    def __init__(self, validation: Validation, *, check_every: int, examples: int):
        self._validation, self._every, self._examples = validation, check_every, examples
        self.seconds, self.best = 0.0, -math.inf  # of training; validation accuracy
        self.best_generation = 0  # that reached it, the last of equals; 0: no check yet
        self.tokens, self.failed, self.scored = 0, 0, False  # failed rewards; whether scores ever differed

    def __call__(self, state: eggroll.ESState, record: Record) -> None:
        """Count a generation, or a step of grpo; check when one is due."""
        report, due = record.aux, (record.generation + 1) % self._every == 0
        if report is None:  # only the first of several processes scores
            self._count(record, tokens=0, failures=0)
        else:
            self._count(record, tokens=report.tokens, failures=report.scores.errors + report.scores.timeouts)
            record.extra.update(report.extra, ended=report.ended, abstained_rewards=report.scores.abstained)
            self._warn(record, report.scores, due=due)
            print_examples(report.examples if due else [])
        if due:
            record.extra["held_out_fitness"] = self.check(record, local(state.params)).accuracy  # it picks the best checkpoint

    def _count(self, record: Record, *, tokens: int, failures: int) -> None:
        """Add seconds, tokens and failed rewards of a generation to the totals and to the record.

        All processes use the clock of the first one, so that they end with the same generation.
        """
        self.seconds += float(broadcast_from_first(lambda: np.asarray(record.seconds)))
        self.tokens, self.failed = self.tokens + tokens, self.failed + failures
        record.extra.update(seconds_spent=self.seconds, tokens=tokens, failed_rewards=failures)
        record.extra["tokens_per_second"] = tokens / record.seconds

    def _warn(self, record: Record, scores: tasks.Scores, *, due: bool) -> None:
        failures = scores.errors + scores.timeouts
        if failures and self.failed == failures:
            warnings.warn(f"a reward failed and scored {scores.minimum:g}: {scores.first_error}", stacklevel=4)
        least = scores.values.min()  # some tasks give partial credit to wrong answers
        self.scored |= bool(scores.values.max() > least)
        if due and not self.scored:
            warnings.warn(
                f"no completion up to generation {record.generation + 1} scored more than {least:g}, so there is no signal to "
                "learn from; try an easier task, a better model or a larger max_new_tokens.",
                stacklevel=4,
            )

    def check(self, record: Record, params: Any) -> Check:
        """Check the unperturbed parameters and print the result."""
        start = time.perf_counter()
        result = self._validation(params, examples=self._examples)
        if result.accuracy >= self.best:
            self.best, self.best_generation = result.accuracy, record.generation + 1
        record.extra.update(validation_accuracy=result.accuracy, validation_tokens=result.tokens)
        record.extra["check_seconds"] = time.perf_counter() - start
        if is_first():
            speed = f"{self.seconds:.0f} s, {record.extra['tokens_per_second']:,.0f} tokens/s"
            rewards = f"reward {record.mean_fitness:.3f}, validation {result.accuracy:.3f}"
            print(f"generation {record.generation + 1}: {rewards}, {speed}", flush=True)
        print_examples(result.examples)
        return result

    def words(self, record: Record) -> str:
        """Return the changing part of the progress line."""
        numbers = {
            f"reward {record.mean_fitness:.3f}": record.mean_fitness,
            f"best {record.best_fitness:.3f}": record.best_fitness,
            f"validation {self.best:.3f} at best": self.best,
            f"{record.members_per_second:,.0f} members/s": record.members_per_second,
            f"{record.extra['tokens_per_second']:,.0f} tokens/s": record.extra["tokens_per_second"],
        }
        return "  ".join(text for text, value in numbers.items() if math.isfinite(value))

    def save(self) -> Any:
        """Return the counts as arrays."""
        numbers = np.array([self.seconds, self.best], np.float64)
        counts = [self.tokens, self.failed, self.scored, self.best_generation]
        return {"numbers": numbers, "counts": np.array(counts, np.int64)}

    def load(self, saved: Any) -> None:
        """Restore the counts from arrays."""
        self.seconds, self.best = (float(value) for value in saved["numbers"])
        self.tokens, self.failed, scored, self.best_generation = (int(value) for value in saved["counts"])
        self.scored = bool(scored)


def print_examples(examples: list[tuple[str, str, float]]) -> None:
    """Print some completions."""
    for prompt, text, score in examples if is_first() else []:
        print(f"    {score:.2f}  {prompt}{text}".replace("\n", "\n          "), flush=True)
