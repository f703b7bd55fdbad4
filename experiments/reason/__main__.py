"""Improve a language model on verifiable rewards: `python -m experiments.reason --help`.

A Hugging Face checkpoint, or a small model that is warm-started on the spot, gets better at a task whose answers can be
checked, by evolution strategies with forward passes only; `--algorithm grpo` is policy gradients by backprop on the same model
functions, sampler, rewards and clock. The last line of standard output is a JSON object with the accuracy before and after.
Artefacts go to one run folder per seed, the improved model in the Hugging Face layout among them.
"""

import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import eggroll
from eggroll.processes import is_first, local, wait_for_all
from experiments.common.memory import peak_mib
from experiments.common.run import SUMMARY, join_processes, print_summary, run_folder, write_json
from experiments.models import hf
from experiments.reason.config import Config, parse, remade
from experiments.reason.evolution import Evolution
from experiments.reason.inputs import load, sampling_of
from experiments.reason.policy import PolicyGradient
from experiments.reason.progress import Progress
from experiments.reason.validation import Validation


def remake(options: dict[str, Any]) -> tuple[Any, eggroll.ESState]:
    """Make the strategy and the initial state of a run again: the recipe of its journal."""
    config = remade(options)
    problem = load(config)
    evolution = Evolution(config, problem, sampling_of(config, problem))
    return evolution.strategy, evolution.start(seed=config.seed)


class Experiment:
    """A problem and what improves its model; every seed is a run of its own."""

    def __init__(self, config: Config):
        self.config, self.problem = config, load(config)
        self.sampling = sampling_of(config, self.problem)
        sizes = {"validation": config.validation_size, "test": config.test_size}
        self.checks = {
            split: Validation(self.problem, split, size=size, sampling=self.sampling) for split, size in sizes.items()
        }
        make = Evolution if config.algorithm == "eggroll" else PolicyGradient
        self.runs = make(config, self.problem, self.sampling)
        self.before = {split: check(self.problem.params) for split, check in self.checks.items()}

    def run_seed(self, seed: int) -> dict[str, Any]:
        """Train with one seed, evaluate, write the artefacts; `summary.json` comes last and says that the run is whole."""
        config, problem, folder = self.config, self.problem, _folder(self.config, seed)
        if is_first():
            (folder / SUMMARY).unlink(missing_ok=True)
            if not config.resume:
                (folder / "journal.bin").unlink(missing_ok=True)
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        wait_for_all("run folder")
        progress = Progress(self.checks["validation"], check_every=config.check_every, examples=config.examples)
        recipe = {"function": "experiments.reason.__main__:remake", "options": config.options() | {"seed": seed}}
        start = time.perf_counter()
        params = local(self.runs.train(seed=seed, folder=folder, progress=progress, recipe=recipe))
        after = {split: check(params) for split, check in self.checks.items()}
        row: dict[str, Any] = {f"{split}_accuracy": check.accuracy for split, check in after.items()}
        row |= {f"{split}_accuracy_before": check.accuracy for split, check in self.before.items()}
        row |= {"generations": progress.generations, "training_seconds": round(progress.seconds, 2), "tokens": progress.tokens}
        row |= {"tokens_per_second": round(progress.tokens / progress.seconds, 1) if progress.seconds else 0.0}
        row |= {"failed_rewards": progress.failed, "seconds": round(time.perf_counter() - start, 2)}
        row["peak_mib"] = round(peak_mib())
        words = f"test accuracy {row['test_accuracy']:.3f}, {row['test_accuracy_before']:.3f} before"
        print(f"seed {seed}: {words}; metrics and model are in {folder}", flush=True)
        if is_first():
            hf.save(folder / "model", problem.config, params, source=problem.source)
            write_json(folder / SUMMARY, {"options": config.options(), "seed": seed} | row)
        return row

    def run(self) -> dict[str, Any]:
        """Run every seed; return the summary that `main` prints."""
        config, start = self.config, {split: check.accuracy for split, check in self.before.items()}
        print(", ".join(f"{split} accuracy {value:.3f}" for split, value in start.items()) + " before training", flush=True)
        rows = [self.run_seed(seed) for seed in range(config.seed, config.seed + config.seeds)]
        about = {"algorithm": config.algorithm, "task": config.task}
        if config.seeds == 1:
            return about | rows[0]
        means = {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}
        return about | means | {"seeds": [{"seed": config.seed + index} | row for index, row in enumerate(rows)]}


def _folder(config: Config, seed: int) -> Path:
    if config.folder is None:
        return run_folder(f"reason-{config.algorithm}-{config.task.replace('/', '-')}-{seed}")
    return run_folder(config.folder if config.seeds == 1 else config.folder / f"seed-{seed}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line; wrong options end it with one sentence."""
    try:
        config = parse(arguments)
        config.check()
        join_processes()
        experiment = Experiment(config)
        try:
            summary = experiment.run()
        finally:
            experiment.problem.scorer.close()
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    print_summary(summary)


if __name__ == "__main__":
    main()
