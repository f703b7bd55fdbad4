"""EGGROLL and GRPO on the same clock, over small models and seeds: `python -m experiments.reason.compare --help`.

Every run is `experiments.reason` in a process of its own on one core; what is in the folder already is not run again. The
folder gets learning curves (`curves.png`), the table (`table.md`) and all numbers (`results.json`). The last line of standard
output is a JSON object.
"""

import dataclasses
import itertools
import os
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal, NamedTuple

import tyro

from eggroll.experiments.common.run import INTERRUPTED, print_summary, run_folder, write_json
from eggroll.experiments.common.seed_runs import finished_seeds, metrics_of, run_seeds
from eggroll.experiments.reason import config as reason
from eggroll.experiments.reason.figure import draw_curves

Curve = tuple[list[float], list[float]]  # seconds of training, validation accuracy


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare algorithms at equal seconds. Options not listed here are handed to experiments.reason."""

    architectures: tuple[Literal["transformer", "rwkv7"], ...] = ("transformer", "rwkv7")
    """Small models, a panel of the figure each."""
    algorithms: tuple[Literal["eggroll", "grpo"], ...] = ("eggroll", "grpo")
    """What improves them."""
    seconds: float = 60.0
    """Seconds of training of every run, compilation included, validation not."""
    generations: int | None = None
    """Generations of every run, or steps of grpo, at most. None: as many as fit into `seconds`."""
    seeds: int = 3
    """Seeds 0, 1, ... of every model and algorithm."""
    cores: tuple[int, ...] | None = None
    """CPU cores; every one has one run at a time. None: all that this process may use."""
    folder: Path = Path("runs/reason-compare")
    """Where everything is, also what an interrupted comparison has finished."""
    figure: Path | None = None
    """Where the figure goes too, such as docs/reasoning.png."""

    def check(self) -> None:
        """Raise ValueError for what experiments.reason would not see."""
        if self.seeds < 1:
            raise ValueError(f"seeds must be an integer >= 1, got {self.seeds}.")
        for name in ("architectures", "algorithms"):
            if not getattr(self, name) or len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} must be different ones, at least one, got {getattr(self, name)}.")
        allowed = sorted(os.sched_getaffinity(0))
        if self.cores is not None and (not self.cores or not set(self.cores) <= set(allowed)):
            raise ValueError(f"cores must be out of {allowed}, got {self.cores}.")


class Run(NamedTuple):
    """One run of the comparison."""

    architecture: str
    algorithm: str
    seed: int


class Study:
    """All runs of a comparison, and what failed."""

    def __init__(self, config: Config, options: Sequence[str]):
        config.check()
        self.config, self.options, self.folder = config, tuple(options), run_folder(config.folder)
        self.failed: dict[str, str] = {}
        self.pairs: list[tuple[str, str]] = list(itertools.product(config.architectures, config.algorithms))
        for pair in self.pairs:
            reason.parse(self._command(*pair)).check()
            self._finished(*pair)

    def _command(self, architecture: str, algorithm: str) -> list[str]:
        limits = ["--seconds", str(self.config.seconds)]
        limits += [] if self.config.generations is None else ["--generations", str(self.config.generations)]
        return ["--start.architecture", architecture, "--algorithm", algorithm, *limits, *self.options]

    def _finished(self, architecture: str, algorithm: str) -> dict[int, dict[str, Any]]:
        """Summaries of the seeds that are whole."""
        parsed = reason.parse(self._command(architecture, algorithm))
        folder, limits = self.folder / architecture / algorithm, {"generations": parsed.generations, "seconds": parsed.seconds}
        found = finished_seeds(folder, range(self.config.seeds), options=parsed.options())
        if any(summary.get("limits") != limits for summary in found.values()):
            raise ValueError(f"{folder} has runs with other limits; choose another folder.")
        return found

    def missing(self) -> list[Run]:
        """Runs that are not whole; those of the same model and seed beside each other, so that they run side by side."""
        found = {pair: self._finished(*pair) for pair in self.pairs}
        seeds = range(self.config.seeds)
        runs = [Run(model, by, seed) for model in self.config.architectures for seed in seeds for by in self.config.algorithms]
        return [run for run in runs if run.seed not in found[run.architecture, run.algorithm]]

    def finish(self) -> None:
        """Run what is missing, a run on every core at a time; a failure is noted and does not end the comparison."""
        cores = self.config.cores or tuple(sorted(os.sched_getaffinity(0)))
        free: SimpleQueue[int] = SimpleQueue()
        for core in cores:
            free.put(core)
        # A process has the cores of the thread that starts it.
        with ThreadPoolExecutor(len(cores), initializer=lambda: os.sched_setaffinity(0, {free.get()})) as pool:
            try:
                list(pool.map(self._run, self.missing()))
            except KeyboardInterrupt:
                pool.shutdown(cancel_futures=True)
                raise

    def _run(self, run: Run) -> None:
        name, start = f"{run.architecture} {run.algorithm} seed {run.seed}", time.perf_counter()
        command = ["eggroll.experiments.reason", *self._command(run.architecture, run.algorithm)]
        try:
            run_seeds(command, self.folder / run.architecture / run.algorithm, [run.seed])
        except RuntimeError as error:
            self.failed[name] = str(error)
        print(f"{name}: {self.failed.get(name, 'done')}  ({time.perf_counter() - start:.0f} s)", flush=True)

    def _curve(self, run: Run, before: float) -> Curve:
        folder = self.folder / run.architecture / run.algorithm
        rows = [row for row in metrics_of(folder, run.seed) if row.get("validation_accuracy") is not None]
        seconds, accuracies = ([row[name] for row in rows] for name in ("seconds_spent", "validation_accuracy"))
        return [0.0, *seconds], [before, *accuracies]

    def write(self) -> dict[str, Any]:
        """Write table, figure and numbers; return the summary."""
        rows: list[dict[str, Any]] = []
        curves: dict[str, dict[str, list[Curve]]] = {}
        for architecture, algorithm in self.pairs:
            found = sorted(self._finished(architecture, algorithm).items())
            if found:
                rows.append(make_row(architecture, algorithm, [summary for _, summary in found]))
                known = [(Run(architecture, algorithm, seed), row["validation_accuracy_before"]) for seed, row in found]
                curves.setdefault(architecture, {})[algorithm] = [self._curve(run, before) for run, before in known]
        (self.folder / "table.md").write_text(table(rows))
        for path in (self.folder / "curves.png", self.config.figure):
            if rows and path is not None:
                draw_curves(curves, path)
        summary = {"seconds": self.config.seconds, "rows": rows, "failed": self.failed}
        write_json(self.folder / "results.json", summary)
        return summary


def make_row(architecture: str, algorithm: str, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Make a row of the summaries of its seeds."""
    by_seed = [summary["test_accuracy"] for summary in found]
    row: dict[str, Any] = {"architecture": architecture, "algorithm": algorithm, "test_accuracy": statistics.fmean(by_seed)}
    row |= {"test_accuracy_before": statistics.fmean(summary["test_accuracy_before"] for summary in found)}
    names = ("generations", "tokens_per_second", "training_seconds", "peak_mib")
    return row | {"by_seed": by_seed} | {name: [summary[name] for summary in found] for name in names}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| model | algorithm | before | test accuracy of the seeds | mean | generations or steps | tokens / s | peak MiB |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        seeds = ", ".join(f"{accuracy:.3f}" for accuracy in row["by_seed"])
        accuracies = f"{row['test_accuracy_before']:.3f} | {seeds} | {row['test_accuracy']:.3f}"
        spans = " | ".join(_span(row[name]) for name in ("generations", "tokens_per_second", "peak_mib"))
        lines.append(f"| {row['architecture']} | {row['algorithm']} | {accuracies} | {spans} |")
    return "\n".join(lines) + "\n"


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):,.0f}", f"{max(values):,.0f}"
    return low if low == high else f"{low} to {high}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line; wrong options end it with one sentence."""
    name = "python -m experiments.reason.compare"
    config, options = tyro.cli(Config, args=arguments, prog=name, return_unknown_args=True)
    try:
        study = Study(config, options)
        study.finish()
        summary = study.write()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the runs that are missing.", file=sys.stderr)
        sys.exit(INTERRUPTED)
    print(f"\n{(study.folder / 'table.md').read_text()}\ntable, curves and numbers are in {study.folder}", flush=True)
    print_summary(summary)
    if study.failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
