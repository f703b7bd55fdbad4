"""The baselines as `experiments.rl` runs them: with the `train` method that `experiments.evolution.Evolution` has."""

import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from jax import Array

import envs
from experiments.baselines.ppo import PPO, Metrics, make_train
from experiments.common.run import jsonable
from experiments.task import Task


class PPORuns:
    """PPO on a task; compiled once, run with any number of keys."""

    def __init__(self, config: PPO, task: Task, *, critic: nn.Module, env_steps: int):
        environment, actor = task.environment, task.network
        train = make_train(config, environment, actor=actor, critic=critic, env_steps=env_steps, normalise=task.normalise)
        self._train = jax.jit(train)
        self._steps_per_update = config.steps_per_update

    def train(self, *, init_key: Array, run_key: Array, check_key: Array, folder: Path) -> dict[str, Any]:
        """Run PPO; `metrics.jsonl` in `folder` gets a line per update. All its keys come from `run_key`.

        Returns:
            params, statistics, generations (rollouts) and env_steps.
        """
        result = jax.block_until_ready(self._train(run_key))
        _write(result.metrics, folder / "metrics.jsonl", steps_per_update=self._steps_per_update)
        invalid, updates = int(result.metrics.invalid.sum()), len(result.metrics.loss)
        if invalid:
            print(f"{invalid} steps gave a reward or an observation that was not finite; they count as ends with reward 0.")
        return {
            "params": result.params,
            "statistics": result.statistics,
            "generations": updates,
            "env_steps": updates * self._steps_per_update,
        }


def _write(metrics: Metrics, path: Path, *, steps_per_update: int) -> None:
    columns = {name: jsonable(column) for name, column in metrics._asdict().items()}
    with open(path, "w") as file:
        for index in range(len(columns["loss"])):
            row = {"update": index, "env_steps": (index + 1) * steps_per_update}
            file.write(json.dumps(row | {name: column[index] for name, column in columns.items()}) + "\n")


class RandomRuns:
    """The random policy, which learns nothing."""

    def train(self, *, init_key: Array, run_key: Array, check_key: Array, folder: Path) -> dict[str, Any]:
        """Return a run of no steps, without parameters."""
        return {"params": None, "statistics": envs.initial_statistics(()), "generations": 0, "env_steps": 0}
