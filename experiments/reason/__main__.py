"""Improve a language model on verifiable rewards: `python -m eggroll.experiments.reason --help`.

Trains a Hugging Face checkpoint, or a small warm-started model, on a task with checkable answers, by evolution strategies
with forward passes only; `--algorithm grpo` is policy gradients by backprop on the same model functions, sampler, rewards and
clock. The last line of standard output is a JSON object with the accuracy before and after. Every seed has a run folder with
its artefacts, the improved model in the Hugging Face layout among them.
"""

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import eggroll
from eggroll.devices.processes import first_does, local
from eggroll.envs.tasks import Reward
from eggroll.experiments.common.contents import Contents, check_contents, recorded_contents
from eggroll.experiments.common.run import exit_on_error, exit_on_interrupt, leave, print_summary, print_text, start_processes
from eggroll.experiments.common.seeds import (
    MODEL,
    Row,
    SeedRun,
    refuse_model_of_the_user,
    refuse_own_model,
    run_seeds,
    seed_folder,
)
from eggroll.experiments.reason.baseline import PolicyGradient
from eggroll.experiments.reason.config import Config, parse, restore_config
from eggroll.experiments.reason.contents import read_contents
from eggroll.experiments.reason.evolution import Evolution, make_optimizer
from eggroll.experiments.reason.figure import draw
from eggroll.experiments.reason.inputs import load, make_sampling, plan, prepare
from eggroll.experiments.reason.measure.memory import run_memory
from eggroll.experiments.reason.measure.outcome import compare, make_report
from eggroll.experiments.reason.measure.probe import probe
from eggroll.experiments.reason.problem import Check, Problem, Sampling, Validation
from eggroll.experiments.reason.progress import Progress, number_of
from eggroll.experiments.reason.prompt_lengths import Lengths
from eggroll.llm import hf

STOPPED = {  # by Ctrl-C
    "eggroll": "stopped; the same command with --resume continues after the last whole generation.",
    "grpo": "stopped; grpo keeps no checkpoints, so the next run starts from the beginning.",
}


def remake(options: dict[str, Any]) -> tuple[Any, eggroll.ESState]:
    """Make the strategy and the initial state of a run again, from the options in its journal; its reward is not imported.

    The options do not include how long prompts may be, nor how many are held out: no bit of a replay depends on them.
    """
    config = dataclasses.replace(restore_config(options), reward=None)
    inputs = prepare(config, reward=_score_nothing, lengths=Lengths(0, 0, math.inf))
    if config.model is None:  # the small model is trained with the rows
        check_contents(options.get("contents"), read_contents(config.data, None), advice="restore it")
    evolution = Evolution(config, load(config, inputs), make_sampling(config, inputs.tokenizer))
    return evolution.strategy, evolution.start(seed=config.seed)


def _score_nothing(completions: Sequence[str], **_: Any) -> list[None]:
    """The reward of a replay, which completes no texts."""
    return [None] * len(completions)


def _folder_name(config: Config) -> str:
    return f"reason-{config.algorithm}-{config.task_name.replace('/', '-')}"


class Experiment:
    """A problem and an algorithm; every seed is a run of its own."""

    def __init__(self, config: Config, problem: Problem, sampling: Sampling, contents: Contents | None):
        self.config, self.problem, self.contents = config, problem, contents
        refuse_own_model(config, config.model, default=_folder_name(config))
        sizes = {"validation": config.validation_size, "test": config.test_size}
        self.checks = {split: Validation(self.problem, split, size=size, sampling=sampling) for split, size in sizes.items()}
        self.runs = (Evolution if config.algorithm == "eggroll" else PolicyGradient)(config, self.problem, sampling)

    def _check(self, params: Any) -> dict[str, Check]:
        return {split: check(params, examples=self.config.examples) for split, check in self.checks.items()}

    def train(self, run: SeedRun, before: dict[str, Check]) -> Row:
        """Train with one seed, evaluate, write the artefacts; return the fields of its summary."""
        config, problem, folder = self.config, self.problem, run.folder
        accuracy = before["validation"].accuracy
        progress = Progress(
            self.checks["validation"],
            check_every=config.check_every,
            examples=config.examples,
            start=accuracy,
            measure=number_of([self.checks["validation"].prompts, self.contents]),
            clock=config.clock,
        )
        start = time.perf_counter()
        improved = self.runs.train(run, progress=progress)
        params = local(improved.params)
        after = self._check(params)
        result = compare(before["test"], after["test"])
        print_text(make_report(run.seed, result, before["test"], after["test"]))
        print(f"seed {run.seed}: metrics, figure and model are in {folder}", flush=True)
        if not progress.best_generation:
            words = "no check was above the start, so the model is the one that it started from."
            print(f"seed {run.seed}: {words} {improved.advice}".rstrip(), flush=True)
        seconds = time.perf_counter() - start
        first_does(lambda: draw(folder))  # again, with the last check
        first_does(lambda: hf.save(folder / MODEL, problem.config, params, source=problem.source))
        return {
            **_accuracies(after),
            **_accuracies(before, "_before"),
            **result,
            "generations": improved.generations,
            "best_generation": progress.best_generation,
            "ended": improved.ended,
            "training_seconds": round(progress.seconds, 2),
            "tokens": progress.tokens,
            "tokens_per_second": round(progress.tokens / progress.seconds, 1) if progress.seconds else 0.0,
            "failed_rewards": progress.failed,
            "seconds": round(seconds, 2),
        }

    def run(self) -> Row:
        """Run every seed; return the summary that `main` prints."""
        config, params = self.config, self.problem.params
        if isinstance(self.runs, Evolution):  # before a run in the folder is replaced
            self.runs.check(params)
        before = self._check(params)
        del params
        words = (f"{name.replace('_', ' ')} {value:.3f}" for name, value in _accuracies(before, "_before").items())
        print(", ".join(words), flush=True)
        summary = run_seeds(
            config,
            lambda run: self.train(run, before),
            experiment="reason",
            default=_folder_name(config),
            options=config.options() | {"contents": self.contents},
            recorded={"limits": config.limits},
            check=refuse_model_of_the_user,
        )
        model = str(config.model or f"small {config.start.architecture}")
        return {"algorithm": config.algorithm, "model": model, "task": config.task_name} | summary


def _accuracies(checks: dict[str, Check], suffix: str = "") -> dict[str, float]:
    return {f"{split}_accuracy{suffix}": check.accuracy for split, check in checks.items()}


def run(config: Config, *, reward: Reward | None = None) -> Row:
    """Run an experiment, plan its memory or probe its settings; return the summary that `main` prints.

    Args:
        config: the options.
        reward: a function that takes the place of the reward that they name; its source is one of the contents of the run.
    """
    config.check()
    if start_processes() and (config.algorithm == "grpo" or config.probe):
        raise ValueError("grpo and a probe run in one process; eggroll runs in several.")
    inputs = prepare(config, reward=reward)
    sampling = make_sampling(config, inputs.tokenizer)  # a plan refuses what a run would
    contents = read_contents(config.data, config.reward, function=reward)
    if contents and config.resume and not config.accept_change:
        for seed in range(config.seed, config.seed + config.seeds):
            folder = seed_folder(config, seed, default=_folder_name(config))
            check_contents(recorded_contents(folder), contents, advice="restore it, or continue with --accept-change")
    if config.plan:
        needed = run_memory(config, inputs, plan(config, inputs, optimizer=make_optimizer(config)))
        print(needed.table())
        return needed.summary()
    problem = load(config, inputs)
    try:
        return probe(config, problem, sampling) if config.probe else Experiment(config, problem, sampling, contents).run()
    finally:
        problem.scorer.close()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line; wrong options end it with a one-line error."""
    config = parse(arguments)
    with exit_on_interrupt(STOPPED[config.algorithm]), exit_on_error():
        summary = run(config)
    print_summary(summary)


if __name__ == "__main__":
    leave(main)
