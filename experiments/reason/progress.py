"""Progress of a reasoning run: rewards, tokens, seconds, checks on validation problems, printed completions."""

import hashlib
import json
import math
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

import eggroll
from eggroll.devices.processes import broadcast_from_first, first_does, is_first, local
from eggroll.envs import tasks
from eggroll.experiments.common.loop import print_end
from eggroll.experiments.common.run import print_text
from eggroll.experiments.reason.config import Config
from eggroll.experiments.reason.measure.unperturbed import Comparison
from eggroll.experiments.reason.problem import Validation
from eggroll.runs.metrics import append_line
from eggroll.runs.training import Record


class Improved(NamedTuple):
    """The result of a run of either algorithm."""

    params: Any
    generations: int  # steps of grpo
    ended: str  # why: "generations" or "seconds"
    advice: str = ""  # what to change, should nothing have been learned


class Report(NamedTuple):
    """The completions of a generation, for the metrics: its aux."""

    tokens: int  # of all completions
    ended: float  # share of completions that a stop token ended
    scores: tasks.Scores
    examples: list[tuple[str, str, float]]  # prompt, completion, score
    extra: Mapping[str, float]  # further metrics of the algorithm
    comparison: Comparison | None = None  # with the unperturbed model, in generations that have one


def number_of(measure: Any) -> int:
    """Return the number, 1 to 2^56, of JSON values that decide what an accuracy is: its problems and its reward."""
    return 1 + int.from_bytes(hashlib.sha256(json.dumps(measure).encode()).digest()[:7], "big")


class Progress:
    """Callback of the training loop; its counts are stored with the state of a run (`eggroll.runs.carried.Carried`).

    Args:
        validation: of unperturbed parameters.
        check_every: generations between checks.
        examples: completions that a check prints.
        start: validation accuracy of the parameters that training starts from, which a check has to beat.
        measure: number of what accuracies are measured by (`number_of`): those by another are not compared. 0: not known.
        clock: wall counts the seconds of generations, processor the processor time of all but the checks.
    """

    def __init__(
        self,
        validation: Validation,
        *,
        check_every: int,
        examples: int,
        start: float = -math.inf,
        measure: int = 0,
        clock: Literal["wall", "processor"] = "wall",
    ):
        self._validation, self._every, self._examples, self._start = validation, check_every, examples, start
        self.seconds, self.best = 0.0, start  # of training; validation accuracy
        self.best_generation = 0  # that reached it, the last of equals; 0: no check beat the start
        self.begins_anew = False  # the best of the run that is resumed was measured otherwise, and is not known any more
        self.tokens, self.failed, self.scored = 0, 0, False  # failed rewards; whether scores ever differed
        self._measure = measure
        self._compared, self._clock, self._processor_start = False, clock, time.process_time()

    def __call__(self, state: eggroll.ESState, record: Record) -> None:
        """Count a generation, or a step of grpo; check when one is due."""
        report, due = record.aux, (record.generation + 1) % self._every == 0
        if report is None:  # only the first of several processes scores
            self._count(record, tokens=0, failures=0)
        else:
            self._count(record, tokens=report.tokens, failures=report.scores.errors + report.scores.timeouts)
            record.extra.update(report.extra, ended=report.ended, abstained_rewards=report.scores.abstained)
            self._warn(record, report.scores, due=due)
            if report.comparison is not None:
                self._compare(record, report.comparison)
            print_examples(report.examples if due else [])
        if due:
            speed = f"reward {record.mean_fitness:.3f}, {record.extra['tokens_per_second']:,.0f} tokens/s"
            record.extra.update(self.check(record.generation + 1, local(state.params), words=speed))
            record.extra["held_out_fitness"] = record.extra["validation_accuracy"]  # it picks the best checkpoint
        self._processor_start = time.process_time()

    def _count(self, record: Record, *, tokens: int, failures: int) -> None:
        """Add seconds, tokens and failed rewards of a generation to the totals and to the record.

        All processes use the clock of the first one, so that they end with the same generation.
        """
        spent = record.seconds if self._clock == "wall" else time.process_time() - self._processor_start
        self.seconds += float(broadcast_from_first(lambda: np.asarray(spent)))
        self.tokens, self.failed = self.tokens + tokens, self.failed + failures
        record.extra.update(seconds_spent=self.seconds, tokens=tokens, failed_rewards=failures)
        record.extra["tokens_per_second"] = tokens / spent

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

    def _compare(self, record: Record, found: Comparison) -> None:
        """Add what a comparison found to the metrics; warn of what the first one of a process shows."""
        record.extra.update(texts_changed=found.texts_changed, unperturbed_reward=float(found.unperturbed.mean()))
        words = "" if self._compared else found.advice(record.tied_pairs, pairs=len(record.coefficients), sigma=record.sigma)
        self._compared = True
        if words:
            warnings.warn(f"generation {record.generation}: {words}", stacklevel=4)

    def check(self, generation: int, params: Any, *, words: str) -> dict[str, float]:
        """Check the unperturbed parameters after some generations, print the result and return its numbers for the metrics."""
        start = time.perf_counter()
        result = self._validation(params, examples=self._examples)
        if result.accuracy > self.best or (self.best_generation and result.accuracy == self.best):
            self.best, self.best_generation = result.accuracy, generation
        if is_first():
            print(f"generation {generation}: validation {result.accuracy:.3f}, {self.seconds:.0f} s, {words}", flush=True)
        print_examples(result.examples)
        numbers = {"validation_accuracy": result.accuracy, "validation_tokens": result.tokens}
        return numbers | {"check_seconds": time.perf_counter() - start}

    def finish(self, state: eggroll.ESState, folder: Path) -> None:
        """Check the last parameters, unless that was just done; every process calls it.

        The result is a line of its own in `metrics.jsonl`, which a continued run drops, and is not stored with the state: with
        more generations a run becomes the one that never stopped here.
        """
        generation = int(state.generation)
        if generation % self._every:
            line = {"generation": generation, "seconds_spent": self.seconds}
            line |= self.check(generation, local(state.params), words="the last one")
            first_does(lambda: append_line(folder, generation, json.dumps(line)))

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
        measure_and_scored = self._measure << 1 | self.scored  # earlier versions, which knew no measure, stored `scored`
        counts = [self.tokens, self.failed, measure_and_scored, self.best_generation]
        return {"numbers": numbers, "counts": np.array(counts, np.int64)}

    def load(self, saved: Any) -> None:
        """Restore the counts from arrays."""
        self.seconds, self.best = (float(value) for value in saved["numbers"])
        self.tokens, self.failed, measure_and_scored, self.best_generation = (int(value) for value in saved["counts"])
        measure, self.scored = measure_and_scored >> 1, bool(measure_and_scored & 1)
        self.begins_anew = measure not in (0, self._measure)
        if self.begins_anew or not self.best_generation:
            self.best, self.best_generation = self._start, 0  # earlier versions did not store that of the start

    def resume(self, state: eggroll.ESState) -> None:
        """Check the parameters that a run is resumed with if the best so far was measured otherwise; every process calls it."""
        if self.begins_anew:
            words = "resumed with other validation problems or another reward: the best is sought from here"
            self.check(int(state.generation), local(state.params), words=words)
            self.begins_anew, self._processor_start = False, time.process_time()


def why_ended(config: Config, generation: int, *, seconds: float) -> str:
    """Return which limit ended a run after some generations and seconds, "generations" or "seconds", and print it."""
    is_done = config.generations is not None and generation >= config.generations
    limit = f"--generations {config.generations} are done" if is_done else f"the limit of {config.time_limit:g} s is reached"
    print_end(f"{generation} generations", limit, seconds=seconds)
    return "generations" if is_done else "seconds"


def print_examples(examples: list[tuple[str, str, float]]) -> None:
    """Print some completions."""
    for prompt, text, score in examples if is_first() else []:
        print_text(f"    {score:.2f}  {prompt}{text}".replace("\n", "\n          "))
