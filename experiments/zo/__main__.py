"""Fine-tune a language model with forward passes only: `python -m experiments.zo --help`.

The recipes of `zo` tune a Hugging Face checkpoint on a JSONL task, or a small model that is made on the spot on a task that
ships; `adam` is backprop on the same loss. The last line of standard output is a JSON object with loss and accuracy before and
after. Artefacts go to one run folder per seed, the tuned model in the Hugging Face layout among them.
"""

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from eggroll.devices.processes import is_first
from eggroll.experiments.common.loop import read_metrics
from eggroll.experiments.common.memory import peak_mib
from eggroll.experiments.common.run import SUMMARY, join_processes, print_summary, run_folder, write_json
from eggroll.experiments.common.seeds import begin, seed_folder, summary_of
from eggroll.experiments.zo.baseline import Backprop
from eggroll.experiments.zo.config import BACKPROP, Config, parse, remade
from eggroll.experiments.zo.data.examples import Examples
from eggroll.experiments.zo.evolution import Evolution
from eggroll.experiments.zo.figure import draw_run
from eggroll.experiments.zo.inputs import load
from eggroll.experiments.zo.problem import FineTuning, score
from eggroll.llm import hf
from eggroll.protocol import Strategy


def make_runs(config: Config, task: FineTuning, judge: Any) -> Evolution | Backprop:
    """Make what trains: `train(params, key=, seed=, folder=, recipe=)`, compiled once for all seeds."""
    if config.recipe == BACKPROP:
        return Backprop(config, task, judge)
    return Evolution(config, task, judge)


def remake(options: dict[str, Any]) -> tuple[Strategy[Any], Any]:
    """Rebuild the tuner and the initial state of a run: the recipe of its journal."""
    config = remade(options)
    with tempfile.TemporaryDirectory() as folder:
        loaded = load(config, Path(folder))
    return Evolution(config, loaded.task, loaded.task.judge()).start(loaded.params, key=jax.random.key(config.seed))


class Experiment:
    """A model, a task and what trains; every seed is a run of its own."""

    def __init__(self, config: Config):
        self.config = config
        root = _folder(config, config.seed) if config.seeds == 1 or config.folder is None else run_folder(config.folder)
        self.loaded = load(config, root)
        self.task, self.judge = self.loaded.task, self.loaded.task.judge()
        self.runs = make_runs(config, self.task, self.judge)

    def run_seed(self, seed: int) -> dict[str, Any]:
        """Train with one seed, evaluate, write the artefacts; `summary.json` comes last and says that the run is whole."""
        config, task, runs = self.config, self.task, self.runs
        folder = _folder(config, seed)
        begin(folder, resume=config.resume)
        before = {name: self._score(self.loaded.params, getattr(task, name)) for name in ("validation", "test")}
        start = time.perf_counter()
        recipe = {"function": "eggroll.experiments.zo.__main__:remake", "options": config.settings() | {"seed": seed}}
        tuned = runs.train(self.loaded.params, key=jax.random.key(seed), seed=seed, folder=folder, recipe=recipe)
        seconds = time.perf_counter() - start
        some = Examples(*(array[: len(task.validation.labels)] for array in task.train))
        after = {"train": self._score(tuned.params, some)}
        after |= {name: self._score(tuned.params, getattr(task, name)) for name in before}
        row = {"steps": tuned.steps, "forwards": tuned.forwards, "seconds": round(seconds, 2)}
        row |= {"forwards_per_second": round(tuned.forwards_per_second, 2), "skipped": tuned.skipped}
        row |= {f"{name}_{what}": value for name, found in after.items() for what, value in found._asdict().items()}
        row |= {f"{name}_{what}_before": value for name, found in before.items() for what, value in found._asdict().items()}
        row["peak_mib"] = round(peak_mib())
        print(f"seed {seed}: test accuracy {after['test'].accuracy:.3f}; metrics and model are in {folder}", flush=True)
        if is_first():
            hf.save(folder / "model", self.loaded.config, tuned.params, source=self.loaded.source)
            draw_run(read_metrics(folder), before["validation"], folder / "curves.png", forwards=runs.forwards)
            write_json(folder / SUMMARY, {"options": config.settings(), "seed": seed} | row)
        return row

    def _score(self, params: Any, examples: Examples) -> Any:
        return score(lambda batch: self.judge(params, batch), examples)

    def run(self) -> dict[str, Any]:
        """Run every seed; return the summary that `main` prints."""
        config = self.config
        rows = [self.run_seed(seed) for seed in range(config.seed, config.seed + config.seeds)]
        return {"recipe": config.recipe, "objective": config.objective} | summary_of(rows, first_seed=config.seed)


def _folder(config: Config, seed: int) -> Path:
    return seed_folder(config, seed, default=f"zo-{config.recipe}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line; wrong options end it with one sentence."""
    try:
        config = parse(arguments)
        config.check()
        join_processes()
        summary = Experiment(config).run()
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    print_summary(summary)


if __name__ == "__main__":
    main()
