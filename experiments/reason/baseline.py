"""GRPO in the frame of the evolution: the same problems, sampler, rewards, checks and files (`experiments.baselines.grpo`)."""

import math
from pathlib import Path
from typing import Any

from eggroll.envs import tasks
from eggroll.experiments.reason import grpo
from eggroll.experiments.reason.config import Config
from eggroll.experiments.reason.figure import draw
from eggroll.experiments.reason.problem import Problem, Sampling
from eggroll.experiments.reason.progress import Improved, Progress
from eggroll.runs.progress import progress_line
from eggroll.runs.training import Record, open_metrics

_OF_MEMBERS = ("sigma", "best_fitness", "std_fitness", "tied_pairs", "pair_correlation", "effective_rank", "moved")
_UNKNOWN = dict.fromkeys((*_OF_MEMBERS, "members_per_second"), math.nan)


class PolicyGradient:
    """GRPO of a problem's model."""

    def __init__(self, config: Config, problem: Problem, sampling: Sampling):
        self._config, self._problem, self._sampling = config, problem, sampling

    def train(self, *, seed: int, folder: Path, progress: Progress, recipe: dict[str, Any]) -> Improved:
        """As `Evolution.train`; it keeps no checkpoints, and the best parameters in memory."""
        config, rows = self._config, self._problem.task.split("train")
        batches = tasks.Batches(rows, batch_size=config.grpo.prompts, seed=seed)
        limits: dict[str, Any] = {"steps": config.generations, "seconds": config.seconds}
        best: Any = None
        with open_metrics(folder, 0) as file, progress_line("seconds spent", config.seconds) as show:

            def on_step(params: Any, done: int, seconds: float, report: grpo.Report) -> None:
                nonlocal best
                record, before = _record(done - 1, seconds - progress.seconds, report), progress.best
                progress.count(record, tokens=report.tokens, failures=report.failures)
                if done % config.check_every == 0 and progress.check(record, params).accuracy > before:
                    best = params
                file.write(record.to_json() + "\n")
                file.flush()
                show(seconds, progress.words(record))

            known: dict[str, Any] = {"sampling": self._sampling, "batches": batches, "seed": seed}
            trained = grpo.train(self._problem, config.grpo, on_step=on_step, **known, **limits)
        draw(folder)
        return Improved(trained.params if best is None else best, trained.steps)


def _record(step: int, seconds: float, report: grpo.Report) -> Record:
    """A step in the form of a generation."""
    extra = {"silent": report.silent, "clipped": report.clipped}
    known: dict[str, Any] = _UNKNOWN | {"gradient_norm": report.gradient_norm, "invalid": 0, "skipped": False}
    return Record(step, mean_fitness=report.reward, seconds=seconds, extra=extra, **known)
