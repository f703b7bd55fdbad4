"""What each setting of evolution strategies does: `python -m eggroll.experiments.rl_choosing --help`.

A baseline on Pendulum, and settings that differ from it in one option, at equal environment steps (`experiments.common.suite`);
then symptoms that Pendulum does not show, on other tasks, each followed by its remedy. The table has the returns next to the
numbers that a run writes and by which it recognises a bad setting; docs/choosing.md shows it. The last line of standard output
is a JSON object.
"""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import tyro

from eggroll.experiments.common.options import check_integers, check_passed
from eggroll.experiments.common.run import exit_on_error, finite_median, number, run_folder
from eggroll.experiments.common.seed_runs import Setting
from eggroll.experiments.common.suite import Report, Result, Suite, markdown_table, one_job_each, run_suite
from eggroll.experiments.rl.config import parse
from eggroll.files import replace_file
from eggroll.runs.diagnosis import RECENT
from eggroll.runs.metrics import read_metrics

MODULE = "eggroll.experiments.rl"
BASELINE = (
    *("--env", "Pendulum-v1", "--hidden-sizes", "64", "64", "--population-size", "64", "--sigma", "0.1"),
    *("--learning-rate", "0.02", "--target", "inf", "--checks", "5", "--resume"),
)
OWN = ("env", "algorithm", "seed", "target", "resume")
KNOBS: dict[str, tuple[str, ...]] = {  # setting, or symptom -> options, each a row
    "population": ("--population-size 16", "--population-size 256"),
    "sigma": ("--sigma 1e-5", "--sigma 0.5", "--sigma 5"),
    "step size": ("--learning-rate 0.002", "--learning-rate 2"),
    "schedules": ("--learning-rate-schedule cosine", "--sigma-schedule cosine"),
    "rank": ("--rank 4",),
    "shaping": ("--shaping z_score", "--shaping pair_sign"),
    "episodes": ("--episodes 4",),
    "observations": ("--no-normalise",),
    "noise reuse": ("--noise-reuse 4",),
    "ties": ("--env CartPole-v1 --sigma 1e-4 --learning-rate 2e-5", "--env CartPole-v1"),
    "unsteady": (
        "--env Acrobot-v1 --population-size 8 --learning-rate 0.1",
        "--env Acrobot-v1 --population-size 8 --learning-rate 0.1 --learning-rate-schedule cosine",
        "--env Acrobot-v1 --population-size 8 --learning-rate 0.01",
    ),
}
MARKS = "<!-- measured: begin -->\n", "<!-- measured: end -->"  # of a page, around the table
NUMBERS = ("std_fitness", "tied_pairs", "pair_correlation", "gradient_norm", "update_over_sigma", "weight_norm")
HEAD = ("setting", "options", "median return [lowest, highest]", "best parameters", "generations", *NUMBERS, "named by the run")


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure what each setting does, mostly on Pendulum. Other options go to all runs of experiments.rl."""

    knobs: tuple[str, ...] = tuple(KNOBS)
    """Settings to vary, and symptoms, next to the baseline."""
    seeds: int = 3
    """Seeds 0, 1, ... of every row."""
    jobs: int = 1
    """Jobs that run at a time."""
    page: Path | None = None
    """Put the table into this page, between its marks, once all rows are there."""
    folder: Path = Path("runs/rl-choosing")
    """Folder of all results; an interrupted suite resumes from it."""


class Row(NamedTuple):
    """One setting."""

    setting: str
    options: str
    returns: tuple[float, ...]  # of the seeds; NaN of one that was not finite
    best_returns: tuple[float, ...]  # those of the parameters of the best held-out check
    generations: int
    numbers: dict[str, float]  # medians over seeds and the last generations
    unusual: tuple[str, ...]  # numbers that a seed named


def labels(knobs: Sequence[str]) -> list[tuple[str, str]]:
    """Return the rows of some knobs: name and option."""
    return [("baseline", ""), *((knob, option) for knob in knobs for option in KNOBS[knob])]


def make_suite(config: Config, options: Sequence[str]) -> Suite:
    """Make the suite.

    Raises:
        ValueError, OSError: an option is wrong, or the page is missing or has no marks.
    """
    check_integers(config, "seeds", "jobs")
    if unknown := [knob for knob in config.knobs if knob not in KNOBS]:
        raise ValueError(f"knobs must be out of {', '.join(KNOBS)}, got {', '.join(unknown)}.")
    if config.page is not None:
        split_page(config.page)
    check_passed(options, own=OWN, ignored=[])
    folder = run_folder(config.folder)
    settings = [make_setting(folder, *row, options) for row in labels(config.knobs)]
    for setting in settings:
        parse(setting.arguments).check()
    return Suite(MODULE, folder, one_job_each(settings, range(config.seeds)), report=report, workers=config.jobs)


def make_setting(folder: Path, knob: str, option: str, options: Sequence[str]) -> Setting:
    """Make the setting of a row; its own option takes precedence."""
    arguments = (*BASELINE, *options, *option.split())
    name = "".join((knob, *option.split())).replace(" ", "-")
    return Setting((knob, option), arguments, parse(arguments).options(), folder / name)


def report(results: Sequence[Result]) -> Report:
    """Return table and numbers."""
    rows = [make_row(result) for result in results]
    return Report(make_table(rows), {"rows": [row._asdict() for row in rows]})


def make_row(result: Result) -> Row:
    """Make a row from the summaries and metrics of its seeds."""
    setting, found = result
    lines = [line for seed in found for line in read_metrics(setting.folder / f"seed-{seed}")[-RECENT:]]
    knob, option = setting.labels
    return Row(
        knob,
        option,
        returns=tuple(number(summary["mean_return"]) for summary in found.values()),
        best_returns=tuple(number(summary["best_return"]) for summary in found.values()),
        generations=round(statistics.median(summary["generations"] for summary in found.values())),
        numbers={name: finite_median(line[name] for line in lines) for name in NUMBERS},
        unusual=tuple(sorted({name for summary in found.values() for name in summary["unusual"]})),
    )


def make_table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    cells = []
    for row in rows:
        best = f"{finite_median(row.best_returns):.0f}"
        numbers = [f"{value:.3g}" for value in row.numbers.values()]
        named = ", ".join(f"`{name}`" for name in row.unusual)
        option = f"`{row.options}`" if row.options else ""
        cells.append([row.setting, option, _spread(row.returns), best, str(row.generations), *numbers, named])
    return markdown_table(HEAD, cells)


def _spread(returns: Sequence[float]) -> str:
    if not all(map(math.isfinite, returns)):
        return "-"
    return f"{statistics.median(returns):.0f} [{min(returns):.0f}, {max(returns):.0f}]"


def split_page(page: Path) -> tuple[str, str, str]:
    """Return what is before, between and after the marks of a page; ValueError if it lacks them."""
    text = page.read_text()
    before, begin, rest = text.partition(MARKS[0])
    table, end, after = rest.partition(MARKS[1])
    if not begin or not end:
        raise ValueError(f"{page} has no {MARKS[0].strip()} and {MARKS[1]}, between which the table goes.")
    return before, table, after


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line; wrong options end it with a one-line error."""
    program = "python -m eggroll.experiments.rl_choosing"
    config, options = tyro.cli(Config, args=arguments, prog=program, return_unknown_args=True)
    run_suite(lambda: make_suite(config, options))
    if config.page is not None:
        with exit_on_error():
            before, _, after = split_page(config.page)
            table = (run_folder(config.folder) / "table.md").read_text()
            replace_file(config.page, ["".join((before, MARKS[0], table, MARKS[1], after)).encode()])


if __name__ == "__main__":
    main()
