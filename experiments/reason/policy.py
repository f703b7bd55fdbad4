"""GRPO in the frame of the evolution: the same problems, sampler, rewards, checks and files (`experiments.baselines.grpo`)."""

import json
import math
from pathlib import Path
from typing import Any

import jax

from eggroll.progress import progress_line
from eggroll.training import Record, open_metrics
from envs import tasks
from experiments.baselines import grpo
from experiments.common.run import jsonable
from experiments.reason.config import Config
from experiments.reason.figure import draw
from experiments.reason.problem import Problem, Sampling
from experiments.reason.progress import Progress


class PolicyGradient:
    """GRPO of a problem's model; compiled once, run with any number of seeds."""

    def __init__(self, config: Config, problem: Problem, sampling: Sampling):
        self._config, self._problem, self._sampling = config, problem, sampling
        self._best: Any = problem.params

    def train(self, *, seed: int, folder: Path, progress: Progress, recipe: dict[str, Any]) -> Any:
        """Run the steps; metrics and figure go to the folder. It keeps no checkpoints, and the best parameters in memory."""
        config, rows = self._config, self._problem.task.split("train")
        batches = tasks.Batches(rows, batch_size=config.grpo.prompts, seed=seed)
        best, before = self._problem.params, float("-inf")
        with open_metrics(folder, 0) as file, progress_line("seconds", config.seconds) as show:

            def on_step(params: Any, done: int, seconds: float, report: Any) -> bool:
                nonlocal best, before
                step = done - 1
                spent, progress.seconds = progress.seconds, seconds
                extra = {"seconds_spent": seconds, **{name: float(value) for name, value in report._asdict().items()}}
                reward = extra.pop("reward")
                extra["tokens_per_second"] = extra["tokens"] / (seconds - spent)
                progress.tokens += int(extra["tokens"])
                row = _record(step, reward, seconds - spent, extra)
                if (step + 1) % config.check_every == 0 and progress.check(row, params).accuracy > before:
                    best, before = jax.tree.map(lambda x: x, params), row.extra["validation_accuracy"]
                file.write(json.dumps(jsonable({"generation": step, "mean_fitness": reward, **row.extra})) + "\n")
                file.flush()
                show(min(seconds, config.seconds), progress.words(row))
                progress.finish(step + 1)
                return seconds >= config.seconds

            how: dict[str, Any] = dict(sampling=self._sampling, batches=batches, seed=seed, steps=config.generations)
            how["seconds"] = config.seconds
            grpo.train(self._problem, config.grpo, on_step=on_step, **how)
        draw(folder)
        return best


def _record(step: int, reward: float, seconds: float, extra: dict[str, float]) -> Record:
    nan = math.nan
    known: dict[str, Any] = dict(sigma=nan, std_fitness=nan, invalid=0, tied_pairs=nan, pair_correlation=nan)
    known |= dict(effective_rank=nan, skipped=False, gradient_norm=nan, moved=nan, members_per_second=nan)
    return Record(step, mean_fitness=reward, best_fitness=nan, seconds=seconds, extra=extra, **known)
