"""EGGROLL and GRPO on the same clock, over models and seeds: `python -m eggroll.experiments.reason.compare --help`.

    python -m eggroll.experiments.reason.compare                                          two small models
    python -m eggroll.experiments.reason.compare --presets smollm2-sums --algorithms eggroll int8 grpo --seconds 1800

Each run is `experiments.reason` on one core (`experiments.common.suite`). The figure, `curves.png`, has the learning curves.
The last line of standard output is a JSON object.
"""

import dataclasses
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

from eggroll.experiments.common.options import (
    check_integers,
    check_passed,
    drop_options,
    effective,
    ignored_options,
    refuse,
    unless,
)
from eggroll.experiments.common.run import run_folder
from eggroll.experiments.common.seed_runs import Setting, Summaries
from eggroll.experiments.common.suite import Job, Report, Result, Suite, markdown_table, run_suite
from eggroll.experiments.reason import config as reason
from eggroll.experiments.reason.effects import RULES
from eggroll.experiments.reason.figure import Curve, draw_curves
from eggroll.experiments.reason.presets import PRESETS
from eggroll.runs.metrics import read_metrics

OWN = ("algorithm", "preset", "start.architecture", "seed", "plan", "probe")
ALGORITHMS = {  # name in the table -> options
    "eggroll": ("--algorithm", "eggroll"),
    "int8": ("--algorithm", "eggroll", "--weights", "int8", "--precision", "stochastic"),
    "grpo": ("--algorithm", "grpo"),
}
COMPARED = (unless(lambda config: bool(config.presets), "with --presets, which take their place", "architectures"),)


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare algorithms at equal seconds. Other options go to those runs of experiments.reason that read them."""

    architectures: tuple[Literal["transformer", "rwkv7"], ...] = ("transformer", "rwkv7")
    """Small models, a panel of the figure each."""
    presets: tuple[str, ...] = ()
    """Presets of experiments.reason, such as smollm2-sums, in place of the small models."""
    algorithms: tuple[Literal["eggroll", "int8", "grpo"], ...] = ("eggroll", "grpo")
    """Algorithms of experiments.reason; int8 is eggroll on int8 matrices that are rounded stochastically."""
    seconds: float = 60.0
    """Seconds of training of every run, compilation included, validation not."""
    generations: int | None = None
    """Generations of every run, or steps of grpo, at most. None: as many as fit into `seconds`."""
    seeds: int = 3
    """Seeds 0, 1, ... of every model and algorithm."""
    cores: tuple[int, ...] | None = None
    """CPU cores; each has one run at a time. None: all that this process may use."""
    folder: Path = Path("runs/reason-compare")
    """Folder of all results; an interrupted comparison resumes from it."""
    figure: Path | None = None
    """Second path of the figure, such as docs/reasoning.png."""

    @property
    def models(self) -> dict[str, tuple[str, ...]]:
        """The name of every panel, and the options that choose its model."""
        if self.presets:
            return {name: ("--preset", name) for name in self.presets}
        return {name: ("--start.architecture", name) for name in self.architectures}

    def check(self) -> None:
        """Raise ValueError for options that experiments.reason does not see."""
        refuse(ignored_options(self, COMPARED, Config()))
        unknown = [name for name in self.presets if name not in PRESETS]
        if unknown:
            raise ValueError(f"presets must be out of {', '.join(PRESETS)}, got {unknown[0]}.")
        check_integers(self, "seeds", "generations")
        for name in ("architectures", "algorithms", "presets"):
            given = getattr(self, name)
            if len(set(given)) < len(given) or (not given and name != "presets"):
                raise ValueError(f"{name} must be different ones, at least one, got {getattr(self, name)}.")
        allowed = sorted(os.sched_getaffinity(0))
        if self.cores is not None and (not self.cores or not set(self.cores) <= set(allowed)):
            raise ValueError(f"cores must be out of {allowed}, got {self.cores}.")


def make_suite(config: Config, options: Sequence[str]) -> Suite:
    """Make the suite; runs of the same model and seed follow each other, so that they run at the same time.

    Raises:
        ValueError: an option is wrong, or the folder has other runs.
    """
    config.check()
    ignored = [
        reason.parse((*chosen, *ALGORITHMS[algorithm], *options)).ignored()
        for chosen in config.models.values()
        for algorithm in config.algorithms
    ]
    check_passed(options, own=OWN, ignored=ignored)
    folder = run_folder(config.folder)
    settings = [make_setting(config, model, algorithm, options) for model in config.models for algorithm in config.algorithms]
    jobs = [
        Job(f"{setting.name} seed {seed}", setting, [seed])
        for model in config.models
        for seed in range(config.seeds)
        for setting in settings
        if setting.labels[0] == model
    ]
    suite = Suite(
        "eggroll.experiments.reason",
        folder,
        jobs,
        report=lambda results: report(config, results),
        check=check_limits,
        cores=config.cores or sorted(os.sched_getaffinity(0)),
        partial=True,
    )
    for setting in settings:
        suite.finished(setting)
    return suite


def make_setting(config: Config, model: str, algorithm: str, options: Sequence[str]) -> Setting:
    """Make the setting of a model and algorithm, without options that have no effect in it; ValueError if one is wrong."""
    limits = ["--seconds", str(config.seconds)]
    limits += [] if config.generations is None else ["--generations", str(config.generations)]
    arguments = (*config.models[model], *ALGORITHMS[algorithm], *limits, *options)
    arguments = drop_options(arguments, reason.parse(arguments).ignored())
    parsed = reason.parse(arguments)
    parsed.check()
    compared = effective(parsed.options(), parsed, RULES)
    return Setting((model, algorithm), arguments, compared, run_folder(config.folder) / model / algorithm)


def check_limits(setting: Setting, found: Summaries) -> Summaries:
    """Return the summaries; ValueError if their runs had other limits."""
    limits = reason.parse(setting.arguments).limits
    if any(summary.get("limits") != limits for summary in found.values()):
        raise ValueError(f"{setting.folder} has runs with other limits; choose another folder.")
    return found


def report(config: Config, results: Sequence[Result]) -> Report:
    """Draw the learning curves; return table and numbers."""
    rows: list[dict[str, Any]] = []
    curves: dict[str, dict[str, list[Curve]]] = {}
    for setting, found in results:
        model, algorithm = setting.labels
        rows.append(make_row(model, algorithm, list(found.values())))
        curves.setdefault(model, {})[algorithm] = [
            read_curve(setting.folder / f"seed-{seed}", before=summary["validation_accuracy_before"])
            for seed, summary in found.items()
        ]
    for path in (run_folder(config.folder) / "curves.png", config.figure):
        if rows and path is not None:
            draw_curves(curves, path)
    return Report(make_table(rows), {"seconds": config.seconds, "rows": rows})


def read_curve(folder: Path, *, before: float) -> Curve:
    """Read the checks of a run: seconds of training, validation accuracies; `before` is the accuracy at second 0."""
    rows = [row for row in read_metrics(folder) if row.get("validation_accuracy") is not None]
    return [0.0, *(row["seconds_spent"] for row in rows)], [before, *(row["validation_accuracy"] for row in rows)]


def make_row(model: str, algorithm: str, summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Make a row from the summaries of its seeds."""
    accuracies = [summary["test_accuracy"] for summary in summaries]
    return {
        "model": model,
        "algorithm": algorithm,
        "test_accuracy": statistics.fmean(accuracies),
        "test_accuracy_before": statistics.fmean(summary["test_accuracy_before"] for summary in summaries),
        "by_seed": accuracies,
        "intervals": [summary["interval"] for summary in summaries],
        "generations": [summary["generations"] for summary in summaries],
        "tokens_per_second": [summary["tokens_per_second"] for summary in summaries],
        "training_seconds": [summary["training_seconds"] for summary in summaries],
        "peak_mib": [summary["peak_mib"] for summary in summaries],
    }


def make_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    head = [
        "model",
        "algorithm",
        "before",
        "test accuracy of the seeds",
        "mean",
        "intervals of the gain",
        "generations or steps",
        "tokens / s",
        "peak MiB",
    ]
    cells = []
    for row in rows:
        accuracies = ", ".join(f"{accuracy:.3f}" for accuracy in row["by_seed"])
        spans = [_span(row[name]) for name in ("generations", "tokens_per_second", "peak_mib")]
        before, mean = f"{row['test_accuracy_before']:.3f}", f"{row['test_accuracy']:.3f}"
        gains = ", ".join("none" if low is None else f"{low:+.3f} to {high:+.3f}" for low, high in row["intervals"])
        cells.append([row["model"], row["algorithm"], before, accuracies, mean, gains, *spans])
    return markdown_table(head, cells)


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):,.0f}", f"{max(values):,.0f}"
    return low if low == high else f"{low} to {high}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line; wrong options end it with a one-line error."""
    name = "python -m eggroll.experiments.reason.compare"
    config, options = tyro.cli(Config, args=arguments, prog=name, return_unknown_args=True)
    run_suite(lambda: make_suite(config, options))


if __name__ == "__main__":
    main()
