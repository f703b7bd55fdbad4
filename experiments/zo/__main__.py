"""Fine-tune a language model with forward passes only: `python -m eggroll.experiments.zo --help`.

The recipes of `zo` tune a Hugging Face checkpoint on a JSONL task, or a small model, trained on the spot, on a task that ships;
`adam` is backprop on the same loss. `--evaluate` and `--probe` train nothing. The last line of standard output is a JSON object
with loss and accuracy before and after. Each seed writes its artefacts to its own run folder, including the tuned model in the
Hugging Face layout.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from eggroll.devices.processes import first_does
from eggroll.experiments.common.contents import check_contents, recorded_contents
from eggroll.experiments.common.run import INTERRUPTED, exit_on_error, leave, print_summary, start_processes
from eggroll.experiments.common.seeds import MODEL, Row, SeedRun, refuse_model_of_the_user, refuse_own_model, run_seeds
from eggroll.experiments.zo.baseline import Backprop
from eggroll.experiments.zo.capacity import shapes_of
from eggroll.experiments.zo.config import BACKPROP, Config, config_from, parse
from eggroll.experiments.zo.data.examples import Examples
from eggroll.experiments.zo.evaluation import evaluate, score_fields, score_parts
from eggroll.experiments.zo.evolution import Evolution
from eggroll.experiments.zo.figure import draw_run
from eggroll.experiments.zo.inputs import Loaded, check_task, load, read_contents
from eggroll.experiments.zo.problem import Score
from eggroll.experiments.zo.progress import words
from eggroll.llm import hf
from eggroll.protocol import Strategy
from eggroll.runs.metrics import read_metrics

STOPPED = {  # by Ctrl-C
    "zo": "stopped; the same command with --resume continues after the last whole step.",
    BACKPROP: "stopped; adam keeps no checkpoints, so the next run starts from the beginning.",
}


def make_runs(config: Config, loaded: Loaded, judge: Any) -> Evolution | Backprop:
    """Make the trainer; its method `train` is compiled once for all seeds."""
    if config.recipe == BACKPROP:
        return Backprop(config, loaded.task, judge)
    evolution = Evolution(config, loaded.task, judge)
    evolution.plan(shapes_of(config, loaded.config))
    return evolution


def remake(options: dict[str, Any]) -> tuple[Strategy[Any], Any]:
    """Remake the tuner and the initial state of a run, from the recipe in its journal."""
    config = config_from(options)
    loaded = load(config)
    return Evolution(config, loaded.task, loaded.task.judge()).start(loaded.params, key=jax.random.key(config.seed))


class Experiment:
    """A model, a task and a recipe that tunes it."""

    def __init__(self, config: Config):
        self.config, self._default = config, f"zo-{config.recipe}"
        refuse_own_model(config, config.model, default=self._default)
        self.loaded = load(config)
        self.contents = read_contents(config.data)
        self.task, self.judge = self.loaded.task, self.loaded.task.judge()
        self.runs = make_runs(config, self.loaded, self.judge)
        self._before: dict[str, Score] = {}

    def train(self, run: SeedRun) -> Row:
        """Tune with one seed, evaluate, write the artefacts; return the fields of its summary."""
        task, folder, held_out = self.task, run.folder, {"validation": self.task.validation, "test": self.task.test}
        sizes = ", ".join(f"{len(part.labels)} {name}" for name, part in {"training": task.train, **held_out}.items())
        print(f"seed {run.seed}: scoring the model before training; {sizes} examples", flush=True)
        before = self._before = self._before or self._scores(self.loaded.read, held_out)
        print(f"zero-shot: {', '.join(f'{name} {words(found)}' for name, found in before.items())}", flush=True)
        tuned = self.runs.train(run, self.loaded.read)
        some = Examples(*(array[: len(task.validation.labels)] for array in task.train))
        after = self._scores(lambda: tuned.params, {"train": some, **held_out})
        print(f"seed {run.seed}: test {words(after['test'])}; metrics and model are in {folder}", flush=True)
        if told := self._without_gain(before["validation"], after["validation"]):
            print(f"seed {run.seed}: {told}. {tuned.advice}".rstrip(), flush=True)

        def write() -> None:
            hf.save(folder / MODEL, self.loaded.config, tuned.params, source=self.loaded.source)
            draw_run(read_metrics(folder), before["validation"], folder / "curves.png", forwards=self.runs.forwards)

        first_does(write)
        return {
            "steps": tuned.steps,
            "forwards": tuned.forwards,
            "ended": tuned.ended,
            "seconds": round(tuned.seconds, 2),
            "forwards_per_second": round(tuned.forwards_per_second, 2),
            "skipped": tuned.skipped,
            **score_fields(after),
            **score_fields(before, "_before"),
        }

    def _without_gain(self, before: Score, after: Score) -> str | None:
        """Say so if the objective is no better than before."""
        if self.config.objective == "accuracy":
            told = f"the validation accuracy {after.accuracy:.3f} is not above that before, {before.accuracy:.3f}"
            return None if after.accuracy > before.accuracy else told
        told = f"the validation loss {after.loss:.4g} is not below that before, {before.loss:.4g}"
        return None if after.loss < before.loss else told

    def _scores(self, read: Callable[[], Any], parts: Mapping[str, Examples]) -> dict[str, Score]:
        return score_parts(self.runs.judge(read()), parts)

    def run(self) -> Row:
        """Run every seed; return the summary that `main` prints."""
        config = self.config
        summary = run_seeds(
            config,
            self.train,
            experiment="zo",
            default=self._default,
            options=config.settings() | {"contents": self.contents},
            check=self._check_folder,
        )
        return {"recipe": config.recipe, "objective": config.objective} | summary

    def _check_folder(self, folder: Path) -> None:
        """Raise ValueError where a folder has what the run would replace, and no run made, or a run of other data."""
        if self.config.resume and not self.config.accept_change:
            advice = "restore it, or continue with --accept-change"
            check_contents(recorded_contents(folder), self.contents, advice=advice)
        refuse_model_of_the_user(folder)
        check_task(self.config, folder)


def measure(config: Config) -> Row:
    """Measure what suggests a learning rate, and nothing else."""
    loaded = load(config)
    evolution = Evolution(config, loaded.task, loaded.task.judge())
    found = evolution.guide(evolution.start(loaded.params, key=jax.random.key(config.seed))[1], seed=config.seed)
    return {"recipe": config.recipe, "objective": config.objective, **found._asdict()}


def run(config: Config) -> Row:
    """Run an experiment, score a model, or measure a learning rate; return the summary that `main` prints."""
    config.check()
    start_processes()
    if config.evaluate:
        return evaluate(config)
    return measure(config) if config.probe else Experiment(config).run()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line; wrong options end it with a one-line error."""
    config = parse(arguments)
    try:
        with exit_on_error():
            summary = run(config)
    except KeyboardInterrupt:
        print(STOPPED.get(config.recipe, STOPPED["zo"]), file=sys.stderr)
        sys.exit(INTERRUPTED)
    print_summary(summary)


if __name__ == "__main__":
    leave(main)
