"""Compare algorithms over tasks and seeds at equal budgets: `python -m eggroll.experiments.rl_suite --help`.

Each task and algorithm runs `experiments.rl` (`experiments.common.suite`). The table compares at equal environment steps, and
at equal seconds of training: those of the task's quickest run. The figure, `curves.png`, has the learning curves against both.
The last line of standard output is a JSON object.
"""

import bisect
import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro

from eggroll import envs
from eggroll.experiments.common.bootstrap import difference_interval, mean_interval
from eggroll.experiments.common.options import check_integers, check_passed, drop_options, effective
from eggroll.experiments.common.run import number, run_folder
from eggroll.experiments.common.seed_runs import Setting, search
from eggroll.experiments.common.suite import Report, Result, Suite, markdown_table, one_job_each, run_suite
from eggroll.experiments.rl.config import EVOLUTION, RULES, parse
from eggroll.experiments.rl.config import Config as RunConfig
from eggroll.experiments.rl.figure import Curve, draw_curves
from eggroll.experiments.rl.inputs import ignored_in, make_environment
from eggroll.experiments.rl.presets import SMALL
from eggroll.experiments.rl.search import SEED, random_options
from eggroll.runs.metrics import read_metrics

MODULE = "eggroll.experiments.rl"
OWN = ("env", "algorithm", "seed", "resume")


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare algorithms over tasks and seeds at equal budgets. Other options go to runs of experiments.rl that read them."""

    envs: tuple[str, ...] = tuple(SMALL)
    """Names of environments."""
    algorithms: tuple[Literal["eggroll", "openes", "ppo", "random"], ...] = ("eggroll", "openes", "ppo")
    """Algorithms of experiments.rl."""
    seeds: int = 5
    """Seeds 0, 1, ... of every task and algorithm."""
    budget: float = 1.0
    """Multiple of the environment steps that experiments.rl gives to a task."""
    search: int = 0
    """Number of settings from the paper's ranges to try first for each task and evolution strategy, one run each; the best is
    used."""
    jobs: int = 1
    """Jobs that run at a time; with more than one the measured seconds mean less."""
    folder: Path = Path("runs/rl-suite")
    """Folder of all results; an interrupted suite resumes from it."""


class Row(NamedTuple):
    """One task and algorithm."""

    env: str
    algorithm: str
    seeds: int
    mean_return: float
    low: float  # 95 % bootstrap interval over seeds
    high: float
    random_return: float  # mean over seeds of uniformly random actions
    env_steps: int  # mean over seeds
    seconds: float  # mean over seeds, of training
    generation_seconds: float  # median over seeds of the medians over generations; PPO: updates
    peak_mib: int  # of the process that ran the seeds
    returns: tuple[float, ...]  # of the seeds
    equal_seconds: float = math.nan  # of training, of the task's quickest run
    return_then: float = math.nan  # mean over seeds at the last held-out check until then
    low_then: float = math.nan
    high_then: float = math.nan


def make_suite(config: Config, options: Sequence[str]) -> Suite:
    """Make the suite.

    Raises:
        ValueError, ModuleNotFoundError: an option is wrong, or the package of an environment is missing.
    """
    check_integers(config, "seeds", "jobs")
    check_integers(config, "search", least=0)
    if config.search and not {*EVOLUTION} & {*config.algorithms}:
        raise ValueError(
            f"--search has no effect with --algorithms {' '.join(config.algorithms)}: it belongs to eggroll and openes."
        )
    if not (math.isfinite(config.budget) and config.budget > 0):
        raise ValueError(f"budget must be a finite number > 0, got {config.budget}.")
    pairs = [(env, algorithm) for env in config.envs for algorithm in config.algorithms]
    check_passed(options, own=OWN, ignored=[_ignored(_arguments(env, name, options)) for env, name in pairs])
    folder, options = run_folder(config.folder), ("--target", "inf", *options)
    settings = [make_setting(folder, env, algorithm, options, budget=config.budget) for env, algorithm in pairs]
    for setting in settings:
        parse(setting.arguments).check()

    def choose(setting: Setting) -> Setting:
        if not config.search or setting.labels[1] not in EVOLUTION:
            return setting
        tries = search_settings(setting, options, number=config.search, budget=config.budget)
        best = search(MODULE, tries, seed=SEED, score=lambda summary: summary["mean_return"])
        return dataclasses.replace(best, labels=setting.labels, folder=setting.folder)

    return Suite(
        MODULE,
        folder,
        one_job_each(settings, range(config.seeds)),
        report=lambda results: report(folder, results),
        choose=choose,
        workers=config.jobs,
    )


def make_setting(folder: Path, env: str, algorithm: str, options: Sequence[str], *, budget: float = 1.0) -> Setting:
    """Make the setting of a task and algorithm, without the options that have no effect in it."""
    arguments = _arguments(env, algorithm, options)
    if budget != 1:
        arguments = (*arguments, "--env-steps", str(round(budget * parse(arguments).env_steps)))
    ignored = _ignored(arguments)
    arguments = drop_options(arguments, ignored)
    parsed = parse(arguments)
    compared = {name: value for name, value in effective(parsed.options(), parsed, RULES).items() if name not in ignored}
    return Setting((env, algorithm), arguments, compared, folder / env.replace("/", "-") / algorithm)


def _arguments(env: str, algorithm: str, options: Sequence[str]) -> tuple[str, ...]:
    """A command line; a seed that was killed continues."""
    return ("--env", env, "--algorithm", algorithm, *options, *(("--resume",) if algorithm in EVOLUTION else ()))


def _ignored(arguments: Sequence[str]) -> dict[str, str]:
    """Options of a run that have no effect, with the errors that say so."""
    parsed = parse(arguments)
    return parsed.ignored() | ignored_in(_environment(parsed.env, parsed.imports), parsed)


@functools.cache
def _environment(env: str, imports: tuple[str, ...]) -> envs.Environment:
    return make_environment(RunConfig(env=env, imports=imports))


def search_settings(setting: Setting, options: Sequence[str], *, number: int, budget: float = 1.0) -> list[Setting]:
    """Return settings to try; `options` of the user take precedence over what is drawn."""
    (env, algorithm), settings = setting.labels, []
    for index in range(number):
        drawn = make_setting(setting.folder, env, algorithm, (*random_options(env, index), *options), budget=budget)
        settings.append(dataclasses.replace(drawn, folder=setting.folder / f"search-{index}"))
    return settings


def report(folder: Path, results: Sequence[Result]) -> Report:
    """Draw the learning curves; return table and numbers."""
    rows: list[Row] = []
    curves: dict[str, dict[str, list[Curve]]] = {}
    for setting, found in results:
        env, algorithm = setting.labels
        rows.append(make_row(env, algorithm, list(found.values())))
        curves.setdefault(env, {})[algorithm] = [read_curve(setting.folder / f"seed-{seed}") for seed in found]
    rows = [add_equal_seconds(row, curves[row.env]) for row in rows]
    if rows:
        draw_curves(curves, {row.env: row.random_return for row in rows}, folder / "curves.png")
    return Report(make_table(rows), compare(rows) | {"rows": [row._asdict() for row in rows]})


def read_curve(folder: Path) -> Curve:
    """Read the held-out checks of a run."""
    rows = list(read_metrics(folder))
    elapsed = itertools.accumulate(without_compilation([row["seconds"] for row in rows]))
    checks = [(row, seconds) for row, seconds in zip(rows, elapsed, strict=True) if "held_out_return" in row]
    steps, returns = ([number(row[name]) for row, _ in checks] for name in ("env_steps", "held_out_return"))
    return Curve(steps, [seconds for _, seconds in checks], returns)


def without_compilation(seconds: Sequence[float]) -> list[float]:
    """Seconds of generations, with the median in place of those that compiled.

    These are the first one, with all that ran in one program with it, which have equal shares of its seconds; and any that took
    more than ten times as long.
    """
    first = len(list(itertools.takewhile(lambda own: own == seconds[0], seconds)))
    usual = statistics.median(seconds[first:] or seconds or [0.0])
    return [usual if index < first or own > 10 * usual else own for index, own in enumerate(seconds)]


def add_equal_seconds(row: Row, curves: Mapping[str, Sequence[Curve]]) -> Row:
    """Add the returns at the seconds of the quickest run of a task; nan where a seed had no check by then."""
    ends = [curve.seconds[-1] for of_seeds in curves.values() for curve in of_seeds if curve.returns]
    if not ends or not all(curve.returns for curve in curves[row.algorithm]):
        return row
    until = min(ends)
    returns = [_at(curve, until) for curve in curves[row.algorithm]]
    low, high = mean_interval(returns) if all(map(math.isfinite, returns)) else (math.nan, math.nan)
    return row._replace(equal_seconds=until, return_then=statistics.fmean(returns), low_then=low, high_then=high)


def _at(curve: Curve, seconds: float) -> float:
    """The return at the last check until then."""
    count = bisect.bisect_right(curve.seconds, seconds)
    return curve.returns[count - 1] if count else math.nan


def make_row(env: str, algorithm: str, summaries: Sequence[dict[str, Any]]) -> Row:
    """Make a row from the summaries of its seeds."""
    returns = tuple(number(s["mean_return"]) for s in summaries)
    low, high = mean_interval(returns)
    return Row(
        env,
        algorithm,
        seeds=len(summaries),
        mean_return=statistics.fmean(returns),
        low=low,
        high=high,
        random_return=statistics.fmean(number(s["random_return"]) for s in summaries),
        env_steps=round(statistics.fmean(s["env_steps"] for s in summaries)),
        seconds=statistics.fmean(s["seconds"] for s in summaries),
        generation_seconds=statistics.median(s["generation_seconds"] for s in summaries),
        peak_mib=max(s["peak_mib"] for s in summaries),
        returns=returns,
    )


def compare(rows: Sequence[Row]) -> dict[str, Any]:
    """Compare the algorithms.

    Returns:
        above_random: task -> algorithm -> whether its interval lies above the random return.
        not_worse: task -> whether the interval of eggroll's mean minus openes' reaches 0.
        generation_ratio: task -> seconds of a generation, openes over eggroll.
    """
    by_env: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_env.setdefault(row.env, {})[row.algorithm] = row
    above = {
        env: {name: row.low > row.random_return for name, row in found.items() if name != "random"}
        for env, found in by_env.items()
    }
    pairs = {env: (found["eggroll"], found["openes"]) for env, found in by_env.items() if {*EVOLUTION} <= {*found}}
    return {
        "above_random": above,
        "not_worse": {env: difference_interval(ours.returns, dense.returns)[1] >= 0 for env, (ours, dense) in pairs.items()},
        "generation_ratio": {
            env: round(dense.generation_seconds / ours.generation_seconds, 2) if ours.generation_seconds else math.nan
            for env, (ours, dense) in pairs.items()
        },
    }


def make_table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    head = ["task", "algorithm", "mean return [95 % interval]", "random", "seeds", "env steps", "seconds", "at equal seconds"]
    cells = []
    for row in rows:
        returns = f"{row.mean_return:.4g} [{row.low:.4g}, {row.high:.4g}]"
        cells.append([row.env, row.algorithm, returns, f"{row.random_return:.4g}", str(row.seeds), f"{row.env_steps:,}"])
        then = f"{row.return_then:.4g} [{row.low_then:.4g}, {row.high_then:.4g}] at {row.equal_seconds:.1f}"
        then = then if math.isfinite(row.return_then) else "-"
        cells[-1] += [f"{row.seconds:.1f}", then, f"{row.generation_seconds:.3g}", f"{row.peak_mib:,}"]
    return markdown_table([*head, "s / generation", "peak MiB"], cells)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line; wrong options end it with a one-line error."""
    config, options = tyro.cli(Config, args=arguments, prog="python -m eggroll.experiments.rl_suite", return_unknown_args=True)
    run_suite(lambda: make_suite(config, options))


if __name__ == "__main__":
    main()
