"""Improve a language model on verifiable rewards: `python -m eggroll.experiments.reason --help`.

Trains a Hugging Face checkpoint, or a small warm-started model, on a task with checkable answers, by evolution strategies
with forward passes only; `--algorithm grpo` is policy gradients by backprop on the same model functions, sampler, rewards and
clock. The last line of standard output is a JSON object with the accuracy before and after. Every seed has a run folder with
its artefacts, the improved model in the Hugging Face layout among them.
"""

import sys
import time
from collections.abc import Sequence
from typing import Any

import eggroll
from eggroll.devices.processes import first_does, local
from eggroll.experiments.common.run import INTERRUPTED, exit_on_error, leave, print_summary, start_processes
from eggroll.experiments.common.seeds import Row, SeedRun, run_seeds
from eggroll.experiments.reason.baseline import PolicyGradient
from eggroll.experiments.reason.config import Config, parse, restore_config
from eggroll.experiments.reason.evolution import Evolution, make_optimizer
from eggroll.experiments.reason.inputs import Inputs, load, make_sampling, plan, prepare
from eggroll.experiments.reason.memory import run_memory
from eggroll.experiments.reason.problem import Validation
from eggroll.experiments.reason.progress import Progress
from eggroll.llm import hf

STOPPED = {  # by Ctrl-C
    "eggroll": "stopped; the same command with --resume continues after the last whole generation.",
    "grpo": "stopped; grpo keeps no checkpoints, so the next run starts from the beginning.",
}


def remake(options: dict[str, Any]) -> tuple[Any, eggroll.ESState]:
    """Make the strategy and the initial state of a run again, from the options in its journal."""
    config = restore_config(options)
    inputs = prepare(config)
    evolution = Evolution(config, load(config, inputs), make_sampling(config, inputs.tokenizer))
    return evolution.strategy, evolution.start(seed=config.seed)


class Experiment:
    """A problem and an algorithm; every seed is a run of its own."""

    def __init__(self, config: Config, inputs: Inputs):
        sampling = make_sampling(config, inputs.tokenizer)
        self.config, self.problem = config, load(config, inputs)
        sizes = {"validation": config.validation_size, "test": config.test_size}
        self.checks = {split: Validation(self.problem, split, size=size, sampling=sampling) for split, size in sizes.items()}
        self.runs = (Evolution if config.algorithm == "eggroll" else PolicyGradient)(config, self.problem, sampling)

    def _accuracies(self, params: Any, suffix: str = "") -> dict[str, float]:
        return {f"{split}_accuracy{suffix}": check(params).accuracy for split, check in self.checks.items()}

    def train(self, run: SeedRun, before: dict[str, float]) -> Row:
        """Train with one seed, evaluate, write the artefacts; return the fields of its summary."""
        config, problem, folder = self.config, self.problem, run.folder
        progress = Progress(self.checks["validation"], check_every=config.check_every, examples=config.examples)
        start = time.perf_counter()
        improved = self.runs.train(seed=run.seed, folder=folder, progress=progress, recipe=run.recipe)
        params = local(improved.params)
        after = self._accuracies(params)
        words = f"test accuracy {after['test_accuracy']:.3f}, {before['test_accuracy_before']:.3f} before"
        print(f"seed {run.seed}: {words}; metrics and model are in {folder}", flush=True)
        if after["validation_accuracy"] <= before["validation_accuracy_before"]:
            print(f"seed {run.seed}: the validation accuracy has not risen. {improved.advice}".rstrip(), flush=True)
        seconds = time.perf_counter() - start
        first_does(lambda: hf.save(folder / "model", problem.config, params, source=problem.source))
        return {
            **after,
            **before,
            "generations": improved.generations,
            "training_seconds": round(progress.seconds, 2),
            "tokens": progress.tokens,
            "tokens_per_second": round(progress.tokens / progress.seconds, 1) if progress.seconds else 0.0,
            "failed_rewards": progress.failed,
            "seconds": round(seconds, 2),
        }

    def run(self) -> Row:
        """Run every seed; return the summary that `main` prints."""
        config, before = self.config, self._accuracies(self.problem.params, "_before")
        print(", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in before.items()), flush=True)
        summary = run_seeds(
            config,
            lambda run: self.train(run, before),
            experiment="reason",
            default=f"reason-{config.algorithm}-{config.task.replace('/', '-')}",
            options=config.options(),
            recorded={"limits": {"generations": config.generations, "seconds": config.seconds}},
        )
        return {"algorithm": config.algorithm, "task": config.task} | summary


def run(config: Config) -> Row:
    """Run an experiment, or plan its memory; return the summary that `main` prints."""
    config.check()
    if start_processes() and config.algorithm == "grpo":
        raise ValueError("grpo runs in one process; eggroll runs in several.")
    inputs = prepare(config)
    if config.plan:
        needed = run_memory(config, inputs, plan(config, inputs, optimizer=make_optimizer(config)))
        print(needed.table())
        return needed.summary()
    experiment = Experiment(config, inputs)
    try:
        return experiment.run()
    finally:
        experiment.problem.scorer.close()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line; wrong options end it with a one-line error."""
    config = parse(arguments)
    try:
        with exit_on_error():
            summary = run(config)
    except KeyboardInterrupt:
        print(STOPPED[config.algorithm], file=sys.stderr)
        sys.exit(INTERRUPTED)
    print_summary(summary)


if __name__ == "__main__":
    leave(main)
