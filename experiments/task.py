"""A policy network acting in an environment: what every reinforcement-learning algorithm here trains and is judged by."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

import envs
from experiments.baselines.uniform import play_uniform


@dataclasses.dataclass(frozen=True)
class Task:
    """A policy network acting in an environment."""

    environment: envs.Environment
    network: nn.Module
    sampled: bool  # whether training samples actions
    normalise: bool

    def play(
        self, params: Any, statistics: envs.ObservationStatistics, key: Array, *, episodes: int, sampled: bool
    ) -> envs.Episode:
        """Run episodes of the policy with `params`; results have a leading axis of `episodes`."""
        policy = envs.network_policy(self.environment, functools.partial(self.network.apply, params), sampled=sampled)
        known = statistics if self.normalise else None
        return envs.run_episodes(self.environment, policy, key=key, episodes=episodes, statistics=known)

    def init_params(self, *, key: Array) -> Any:
        """Draw initial parameters of the policy."""
        return self.network.init(key, jnp.zeros(envs.input_size(self.environment), jnp.float32))


class Evaluation:
    """Mean returns over fresh episodes, compiled once for all seeds of a task."""

    def __init__(self, task: Task, *, episodes: int):
        self._play: Callable = jax.jit(functools.partial(task.play, episodes=episodes, sampled=False))
        self._uniform: Callable = jax.jit(functools.partial(play_uniform, task.environment, episodes=episodes))

    def mean_return(self, params: Any, statistics: envs.ObservationStatistics, *, key: Array) -> float:
        """Mean return of `params`, actions being deterministic."""
        return float(self._play(params, statistics, key).total_reward.mean())

    def random_return(self, *, key: Array) -> float:
        """Mean return of uniformly drawn actions."""
        return float(self._uniform(key=key).total_reward.mean())
