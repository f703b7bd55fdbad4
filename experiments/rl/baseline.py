"""The baselines of `experiments.rl`: PPO and the random policy, with the interface of `experiments.rl.evolution.Evolution`."""

import contextlib
import json
import logging
import statistics
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from eggroll import envs
from eggroll.experiments.common.run import jsonable
from eggroll.experiments.common.seeds import SeedRun
from eggroll.experiments.rl.config import Config
from eggroll.experiments.rl.ppo import Metrics, make_trainer
from eggroll.experiments.rl.problem import Evaluation, HeldOutChecks, Task, Trained, seed_keys
from eggroll.experiments.rl.report import draw
from eggroll.runs.metrics import seal
from eggroll.runs.progress import progress_line

logger = logging.getLogger(__name__)


class PolicyGradient:
    """PPO on a task; compiled once, run with any number of keys."""

    def __init__(self, config: Config, task: Task, evaluation: Evaluation, *, critic: nn.Module):
        if jax.process_count() > 1:
            raise ValueError(f"algorithm ppo runs in one process, this run has {jax.process_count()}.")
        self._trainer = make_trainer(
            config.ppo,
            task.environment,
            actor=task.network,
            critic=critic,
            env_steps=config.env_steps,
            normalise=task.normalise,
        )
        self._start, self._advance = jax.jit(self._trainer.start), jax.jit(self._trainer.advance)
        self._config, self._evaluation = config, evaluation

    def train(self, seed_run: SeedRun, *, random_return: float | None = None) -> Trained:
        """Run PPO; `metrics.jsonl` in the folder of the run gets a line per update, and its figure is drawn."""
        config, keys = self._config, seed_keys(seed_run.seed)
        folder, held_out = seed_run.folder, ""
        checks = HeldOutChecks(self._evaluation, folder, config, key=keys.checks)
        run = self._start(keys.training)  # it draws the initial parameters too
        rows: list[dict[str, Any]] = []
        with contextlib.ExitStack() as stack:
            stack.callback(_draw, folder, random_return=random_return)  # when it is stopped, too
            file = stack.enter_context(open(folder / "metrics.jsonl", "w"))
            show = stack.enter_context(progress_line("env steps", config.env_steps))
            for update in range(self._trainer.updates):
                start = time.perf_counter()
                run, metrics = self._advance(run)
                rows.append(_row(metrics, update, env_steps=(update + 1) * config.ppo.steps_per_update))
                rows[-1]["seconds"] = time.perf_counter() - start
                learner = run.learner
                actor = learner.params["actor"]
                found = checks(actor, learner.statistics, env_steps=rows[-1]["env_steps"])
                rows[-1] |= found
                held_out = f"  held-out {found['held_out_return']:.4g}" if found else held_out
                file.write(seal(json.dumps(jsonable(rows[-1]))))
                file.flush()
                speed = config.ppo.steps_per_update / rows[-1]["seconds"]
                words = f"update {update}  mean return {rows[-1]['mean_return']:.4g}{held_out}  {speed:,.0f} steps/s"
                show(rows[-1]["env_steps"], words)
                if checks.met:
                    break
        return Trained(
            actor,
            learner.statistics,
            generations=len(rows),
            generation_seconds=statistics.median(row["seconds"] for row in rows),
            env_steps=rows[-1]["env_steps"],
            invalid=sum(row["invalid"] for row in rows),
            checks=checks,
        )


def _draw(folder: Path, *, random_return: float | None) -> None:
    """Draw the figure; one that fails is a warning, and hides neither the result nor what ended the run."""
    try:
        draw(folder, random_return=random_return)
    except Exception as failed:
        logger.warning("the figure was not drawn: %s", failed)


def _row(metrics: Metrics, update: int, *, env_steps: int) -> dict[str, Any]:
    """One line of metrics; fetching them is what waits for the update to finish."""
    numbers = {name: value.item() for name, value in jax.device_get(metrics)._asdict().items()}
    return {"update": update, "env_steps": env_steps} | numbers


class RandomPolicy:
    """The random policy, which learns nothing."""

    def train(self, seed_run: SeedRun, *, random_return: float | None = None) -> Trained:
        """Return a run of no steps, without parameters."""
        return Trained(None, envs.initial_statistics(()), generations=0, generation_seconds=0.0, env_steps=0, invalid=0)
