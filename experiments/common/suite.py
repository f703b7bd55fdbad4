"""Compare settings of an experiment over seeds. Every suite is this loop, with its own settings, table and figure.

A job runs the missing seeds of one setting in a process of its own, so that peak memory is that of the run. After each job the
suite writes its table (`table.md`), its figure and all numbers (`results.json`). A failed job is recorded and the suite
continues. Started again with the same folder, a suite runs only the missing seeds.
"""

import dataclasses
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

from eggroll.experiments.common.run import INTERRUPTED, exit_on_error, print_summary, use_compilation_cache, write_json
from eggroll.experiments.common.seed_runs import Setting, Summaries, finished_seeds, launch_seeds


class Job(NamedTuple):
    """Seeds of a setting that run in one process, which compiles once."""

    name: str
    setting: Setting
    seeds: Sequence[int]


class Result(NamedTuple):
    """A setting and the summaries of its seeds, in the order of the seeds."""

    setting: Setting
    summaries: Summaries


class Report(NamedTuple):
    """What a suite makes of its results, apart from the figure."""

    table: str  # Markdown
    numbers: dict[str, Any]  # of results.json, and the last line of standard output


@dataclasses.dataclass(frozen=True)
class Suite:
    """A comparison.

    Args:
        module: the experiment, such as "eggroll.experiments.rl".
        folder: of the suite.
        jobs: in the order in which they start; rows have the order of their first jobs.
        report: draws the figure, returns table and numbers; called after each job.
        choose: called before a job runs; returns its setting, or another one that a search found.
        check: returns the summaries of the runs that are finished, out of those found in the folder of a setting; raises
            ValueError if these cannot be compared.
        workers: jobs that run at a time.
        cores: CPU cores to pin workers to, one each; they replace `workers`.
        partial: whether a setting has a row before all of its seeds have finished.
    """

    module: str
    folder: Path
    jobs: Sequence[Job]
    report: Callable[[Sequence[Result]], Report]
    choose: Callable[[Setting], Setting] = lambda setting: setting
    check: Callable[[Setting, Summaries], Summaries] = lambda setting, found: found
    workers: int = 1
    cores: Sequence[int] = ()
    partial: bool = False

    def seeds(self, setting: Setting) -> list[int]:
        """Return the seeds of all jobs of a setting."""
        return sorted({seed for job in self.jobs if job.setting.name == setting.name for seed in job.seeds})

    def finished(self, setting: Setting) -> Summaries:
        """Return the summaries of the seeds of a setting that have finished; ValueError if the folder has other runs."""
        return self.check(setting, finished_seeds(setting, self.seeds(setting)))


def one_job_each(settings: Iterable[Setting], seeds: Sequence[int]) -> list[Job]:
    """Return a job per setting, with all seeds."""
    return [Job(setting.name, setting, seeds) for setting in settings]


def run_suite(make: Callable[[], Suite]) -> None:
    """Make and run a suite, print its table and one line of JSON; exit with status 1 if a job failed, or on an error."""
    use_compilation_cache()
    with exit_on_error():
        run = _SuiteRun(make())
        try:
            run.run_jobs()
        except KeyboardInterrupt:
            print("stopped; the same command runs the missing seeds.", file=sys.stderr)
            sys.exit(INTERRUPTED)
        report = run.write()
    print(f"\n{report.table}\ntable, figure and numbers are in {run.suite.folder}", flush=True)
    print_summary(report.numbers)
    if run.failed:
        sys.exit(1)


class _SuiteRun:
    """Progress of a suite: the settings with results, and the errors of failed jobs."""

    def __init__(self, suite: Suite):
        self.suite = suite
        self.failed: dict[str, str] = {}  # job -> error
        self._chosen: dict[str, Setting] = {}  # settings with a job that succeeded
        self._lock, self._start, self._done = threading.Lock(), time.perf_counter(), 0

    def run_jobs(self) -> None:
        """Run all jobs, several at a time if so configured."""
        suite, cores = self.suite, SimpleQueue[int]()
        if suite.workers == 1 and not suite.cores:
            for job in suite.jobs:
                self._run(job)
            return
        for core in suite.cores:
            cores.put(core)

        def pin() -> None:
            if suite.cores:
                os.sched_setaffinity(0, {cores.get()})  # processes inherit the core of the thread that starts them

        with ThreadPoolExecutor(len(suite.cores) or suite.workers, initializer=pin) as pool:
            try:
                list(pool.map(self._run, suite.jobs))
            except KeyboardInterrupt:
                pool.shutdown(cancel_futures=True)
                raise

    def _run(self, job: Job) -> None:
        suite = self.suite
        try:
            setting = suite.choose(job.setting)
            finished = suite.check(setting, finished_seeds(setting, job.seeds))
            launch_seeds(suite.module, setting, [seed for seed in job.seeds if seed not in finished])
            suite.check(setting, finished_seeds(setting, job.seeds))
            self._chosen[setting.name] = setting
        except (RuntimeError, ValueError) as error:
            self.failed[job.name] = str(error)
        with self._lock:
            self._done += 1
            self._print_progress(job)
            self.write()

    def _print_progress(self, job: Job) -> None:
        minutes, jobs = (time.perf_counter() - self._start) / 60, len(self.suite.jobs)
        left = minutes / self._done * (jobs - self._done)
        clock = f"{self._done} of {jobs}, {minutes:.1f} min, {left:.1f} left"
        print(f"{job.name}: {self.failed.get(job.name, 'done')}  ({clock})", flush=True)

    def results(self) -> list[Result]:
        """Return the settings that have a row."""
        results = []
        for name in dict.fromkeys(job.setting.name for job in self.suite.jobs):
            if name in self._chosen and name not in self.failed:
                setting = self._chosen[name]
                try:
                    found = self.suite.finished(setting)
                except ValueError as error:  # of another seed than that of the job
                    self.failed[name] = str(error)
                    continue
                if len(found) == len(self.suite.seeds(setting)) or (self.suite.partial and found):
                    results.append(Result(setting, found))
        return results

    def write(self) -> Report:
        """Write table, figure and numbers."""
        table, numbers = self.suite.report(self.results())
        numbers = numbers | {"failed": self.failed}
        (self.suite.folder / "table.md").write_text(table)
        write_json(self.suite.folder / "results.json", numbers)
        return Report(table, numbers)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return rows of cells as a Markdown table."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    lines.insert(1, "|---" * len(head) + "|")
    return "\n".join(lines) + "\n"
