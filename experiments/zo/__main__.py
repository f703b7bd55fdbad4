"""Fine-tune a language model with forward passes only: `python -m eggroll.experiments.zo --help`.

The recipes of `zo` tune a Hugging Face checkpoint on a JSONL task, or a small model, trained on the spot, on a task that ships;
`adam` is backprop on the same loss. The last line of standard output is a JSON object with loss and accuracy before and after.
Each seed writes its artefacts to its own run folder, including the tuned model in the Hugging Face layout.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from eggroll.devices.processes import first_does
from eggroll.experiments.common.run import exit_on_error, print_summary, run_folder, start_processes
from eggroll.experiments.common.seeds import Row, SeedRun, run_seeds, seed_folder
from eggroll.experiments.zo.baseline import Backprop
from eggroll.experiments.zo.config import BACKPROP, Config, config_from, parse
from eggroll.experiments.zo.data.examples import Examples
from eggroll.experiments.zo.evolution import Evolution
from eggroll.experiments.zo.figure import draw_run
from eggroll.experiments.zo.inputs import load
from eggroll.experiments.zo.problem import FineTuning, Score, score
from eggroll.llm import hf
from eggroll.protocol import Strategy
from eggroll.runs.metrics import read_metrics


def make_runs(config: Config, task: FineTuning, judge: Any) -> Evolution | Backprop:
    """Make the trainer; its method `train` is compiled once for all seeds."""
    if config.recipe == BACKPROP:
        return Backprop(config, task, judge)
    return Evolution(config, task, judge)


def remake(options: dict[str, Any]) -> tuple[Strategy[Any], Any]:
    """Remake the tuner and the initial state of a run, from the recipe in its journal."""
    config = config_from(options)
    with tempfile.TemporaryDirectory() as folder:
        loaded = load(config, Path(folder))
    return Evolution(config, loaded.task, loaded.task.judge()).start(loaded.params, key=jax.random.key(config.seed))


class Experiment:
    """A model, a task and a recipe that tunes it."""

    def __init__(self, config: Config):
        self.config, self._default = config, f"zo-{config.recipe}"
        shared = None if config.seeds == 1 else config.folder  # several seeds share the data
        root = seed_folder(config, config.seed, default=self._default) if shared is None else run_folder(shared)
        self.loaded = load(config, root)
        self.task, self.judge = self.loaded.task, self.loaded.task.judge()
        self.runs = make_runs(config, self.task, self.judge)

    def train(self, run: SeedRun) -> Row:
        """Tune with one seed, evaluate, write the artefacts; return the fields of its summary."""
        task, params, folder = self.task, self.loaded.params, run.folder
        before = {"validation": self._score(params, task.validation), "test": self._score(params, task.test)}
        start, key = time.perf_counter(), jax.random.key(run.seed)
        tuned = self.runs.train(params, key=key, seed=run.seed, folder=folder, recipe=run.recipe)
        seconds = time.perf_counter() - start
        some = Examples(*(array[: len(task.validation.labels)] for array in task.train))
        splits = {"train": some, "validation": task.validation, "test": task.test}
        after = {name: self._score(tuned.params, examples) for name, examples in splits.items()}
        print(f"seed {run.seed}: test accuracy {after['test'].accuracy:.3f}; metrics and model are in {folder}", flush=True)
        losses = after["validation"].loss, before["validation"].loss
        if not losses[0] < losses[1]:
            told = f"the validation loss {losses[0]:.4g} is not below that before, {losses[1]:.4g}"
            print(f"seed {run.seed}: {told}. {tuned.advice}".rstrip(), flush=True)

        def write() -> None:
            hf.save(folder / "model", self.loaded.config, tuned.params, source=self.loaded.source)
            draw_run(read_metrics(folder), before["validation"], folder / "curves.png", forwards=self.runs.forwards)

        first_does(write)
        return {
            "steps": tuned.steps,
            "forwards": tuned.forwards,
            "seconds": round(seconds, 2),
            "forwards_per_second": round(tuned.forwards_per_second, 2),
            "skipped": tuned.skipped,
            **_score_fields(after, ""),
            **_score_fields(before, "_before"),
        }

    def _score(self, params: Any, examples: Examples) -> Score:
        return score(lambda batch: self.judge(params, batch), examples)

    def run(self) -> Row:
        """Run every seed; return the summary that `main` prints."""
        config = self.config
        summary = run_seeds(config, self.train, experiment="zo", default=self._default, options=config.settings())
        return {"recipe": config.recipe, "objective": config.objective} | summary


def _score_fields(scores: Mapping[str, Score], suffix: str) -> Row:
    return {f"{name}_{what}{suffix}": value for name, found in scores.items() for what, value in found._asdict().items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line; wrong options end it with a one-line error."""
    with exit_on_error():
        config = parse(arguments)
        config.check()
        start_processes()
        summary = Experiment(config).run()
    print_summary(summary)


if __name__ == "__main__":
    main()
