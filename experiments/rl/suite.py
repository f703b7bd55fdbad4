"""Compare algorithms over tasks and seeds at equal budgets: `python -m experiments.rl_suite --help`.

Every task and algorithm is `experiments.rl` in processes of their own, so peak memory is theirs. The folder has a folder per
run, and after every run the table (`table.md`), the learning curves (`curves.png`) and all numbers (`results.json`). Started
again with the same folder it runs what is missing. The last line of standard output is a JSON object.
"""

import concurrent.futures
import dataclasses
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

from eggroll import envs
from eggroll.experiments.common.run import print_summary, run_folder, write_json
from eggroll.experiments.rl import search
from eggroll.experiments.rl.config import parse
from eggroll.experiments.rl.figure import draw_curves
from eggroll.experiments.rl.presets import SMALL
from eggroll.experiments.rl.runs import Runs
from eggroll.experiments.rl.table import Row, compare, make_row, table

TASKS = tuple(SMALL)


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare algorithms over tasks and seeds at equal budgets. Options not listed here are handed to experiments.rl."""

    envs: tuple[str, ...] = TASKS
    """Names of environments."""
    algorithms: tuple[Literal["eggroll", "openes", "ppo", "random"], ...] = ("eggroll", "openes", "ppo")
    """Algorithms of experiments.rl."""
    seeds: int = 5
    """Seeds 0, 1, ... of every task and algorithm."""
    search: int = 0
    """First try so many settings of the paper's ranges for every task and evolution strategy, one run each; use the best."""
    jobs: int = 1
    """Runs side by side; with more than one the seconds say less."""
    folder: Path = Path("runs/rl-suite")
    """Where everything is, also what an interrupted suite has finished."""


class Suite:
    """All runs of a suite, their results so far, and what failed."""

    def __init__(self, config: Config, options: Sequence[str]):
        self.config, self.options = config, ("--target", "inf", *options)
        self.failed: dict[str, str] = {}
        self.folder = run_folder(config.folder)
        self.runs: dict[tuple[str, str], Runs] = {}
        for env in config.envs:
            for algorithm in config.algorithms:
                self.runs[env, algorithm] = self._make(env, algorithm, self.options)
                parse(self.runs[env, algorithm].arguments).check()
        self._lock, self._start, self._done = threading.Lock(), time.perf_counter(), 0

    def _make(self, env: str, algorithm: str, options: Sequence[str]) -> Runs:
        return Runs(env, algorithm, tuple(options), self._folder_of(env, algorithm), range(self.config.seeds))

    def _folder_of(self, env: str, algorithm: str) -> Path:
        return self.folder / env.replace("/", "-") / algorithm

    def finish(self, name: tuple[str, str]) -> None:
        """Search where asked, run what is missing, write the results so far; a failure is noted and does not end the suite."""
        env, algorithm = name
        try:
            if self.config.search and algorithm in ("eggroll", "openes"):
                tries = search.tries(env, algorithm, self.options, self._folder_of(env, algorithm), number=self.config.search)
                for run in tries:
                    run.finish()
                self.runs[name] = self._make(env, algorithm, search.best(tries))
            self.runs[name].finish()
        except (RuntimeError, ValueError) as error:
            self.failed[f"{env} {algorithm}"] = str(error)
        with self._lock:
            self._done += 1
            self._tell(env, algorithm)
            self.write()

    def _tell(self, env: str, algorithm: str) -> None:
        minutes = (time.perf_counter() - self._start) / 60
        left = minutes / self._done * (len(self.runs) - self._done)
        outcome = self.failed.get(f"{env} {algorithm}", "done")
        print(f"[{self._done}/{len(self.runs)}] {env} {algorithm}: {outcome}  ({minutes:.1f} min, {left:.1f} left)", flush=True)

    def rows(self) -> list[Row]:
        """Rows of the tasks and algorithms whose seeds are all there."""
        rows = []
        for (env, algorithm), runs in self.runs.items():
            finished = runs.finished() if f"{env} {algorithm}" not in self.failed else {}
            if len(finished) == self.config.seeds:
                rows.append(make_row(env, algorithm, list(finished.values())))
        return rows

    def write(self) -> dict[str, Any]:
        """Write table, figure and numbers; return the summary."""
        rows = self.rows()
        (self.folder / "table.md").write_text(table(rows))
        if rows:
            curves: dict[str, dict[str, Any]] = {}
            for row in rows:
                curves.setdefault(row.env, {})[row.algorithm] = self.runs[row.env, row.algorithm].curves()
            draw_curves(curves, {row.env: row.random_return for row in rows}, self.folder / "curves.png")
        summary = compare(rows) | {"failed": self.failed, "rows": [row._asdict() for row in rows]}
        write_json(self.folder / "results.json", summary)
        return summary


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line; wrong options end it with one sentence."""
    config, options = tyro.cli(Config, args=arguments, prog="python -m experiments.rl_suite", return_unknown_args=True)
    try:
        for name in ("seeds", "jobs"):
            if getattr(config, name) < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {getattr(config, name)}.")
        for env in config.envs:
            envs.make(env)
        suite = Suite(config, options)
    except (ValueError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
    with concurrent.futures.ThreadPoolExecutor(config.jobs) as pool:
        list(pool.map(suite.finish, suite.runs))
    summary = suite.write()
    print(f"\n{(suite.folder / 'table.md').read_text()}\ntable, curves and numbers are in {suite.folder}", flush=True)
    print_summary(summary)
    if suite.failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
