"""Improve a language model on verifiable rewards: `python -m experiments.reason --help`.

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
from eggroll.devices.processes import is_first, local
from eggroll.experiments.common.memory import peak_mib
from eggroll.experiments.common.run import INTERRUPTED, SUMMARY, join_processes, leave, print_summary, write_json
from eggroll.experiments.common.seeds import begin, seed_folder, summary_of
from eggroll.experiments.reason.baseline import PolicyGradient
from eggroll.experiments.reason.config import Config, parse, restore_config
from eggroll.experiments.reason.evolution import Evolution
from eggroll.experiments.reason.inputs import Inputs, load, make_sampling, plan, prepare
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

    def run_seed(self, seed: int, before: dict[str, float]) -> dict[str, Any]:
        """Train with one seed, evaluate, write the artefacts; `summary.json` comes last and says that the run is whole."""
        config, problem = self.config, self.problem
        folder = seed_folder(config, seed, default=f"reason-{config.algorithm}-{config.task.replace('/', '-')}")
        begin(folder, resume=config.resume)
        progress = Progress(self.checks["validation"], check_every=config.check_every, examples=config.examples)
        recipe = {"function": "eggroll.experiments.reason.__main__:remake", "options": config.options() | {"seed": seed}}
        start = time.perf_counter()
        improved = self.runs.train(seed=seed, folder=folder, progress=progress, recipe=recipe)
        params = local(improved.params)
        row: dict[str, Any] = self._accuracies(params) | before | {"generations": improved.generations}
        row |= {"training_seconds": round(progress.seconds, 2), "tokens": progress.tokens}
        row |= {"tokens_per_second": round(progress.tokens / progress.seconds, 1) if progress.seconds else 0.0}
        row |= {"failed_rewards": progress.failed, "seconds": round(time.perf_counter() - start, 2)}
        row["peak_mib"] = round(peak_mib())
        words = f"test accuracy {row['test_accuracy']:.3f}, {row['test_accuracy_before']:.3f} before"
        print(f"seed {seed}: {words}; metrics and model are in {folder}", flush=True)
        if is_first():
            hf.save(folder / "model", problem.config, params, source=problem.source)
            limits = {"generations": config.generations, "seconds": config.seconds}
            write_json(folder / SUMMARY, {"options": config.options(), "seed": seed, "limits": limits} | row)
        return row

    def run(self) -> dict[str, Any]:
        """Run every seed; return the summary that `main` prints."""
        config, before = self.config, self._accuracies(self.problem.params, "_before")
        print(", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in before.items()), flush=True)
        rows = [self.run_seed(seed, before) for seed in range(config.seed, config.seed + config.seeds)]
        return {"algorithm": config.algorithm, "task": config.task} | summary_of(rows, first_seed=config.seed)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line; wrong options end it with one sentence."""
    try:
        config = parse(arguments)
        config.check()
        if join_processes() and config.algorithm == "grpo":
            raise ValueError("grpo runs in one process; eggroll runs in several.")
        inputs = prepare(config)
        if config.plan:
            needed = plan(config, inputs)
            print(needed.table())
            summary = needed._asdict()
        else:
            experiment = Experiment(config, inputs)
            try:
                summary = experiment.run()
            finally:
                experiment.problem.scorer.close()
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print(STOPPED[config.algorithm], file=sys.stderr)
        sys.exit(INTERRUPTED)
    print_summary(summary)


if __name__ == "__main__":
    leave(main)
