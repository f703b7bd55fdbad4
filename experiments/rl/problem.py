"""A policy network acting in an environment, which all algorithms train, and its evaluation on fresh episodes."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax import Array

from eggroll import envs
from eggroll.envs.rollout import Policy
from eggroll.experiments.rl.networks import init_network, initial_memory
from eggroll.experiments.rl.uniform import play_uniform


@dataclasses.dataclass(frozen=True)
class Task:
    """A policy network acting in an environment."""

    environment: envs.Environment
    network: nn.Module  # as `experiments.rl.networks` describes it
    sampled: bool  # whether actions are sampled: by evolution strategies, and in evaluation
    normalise: bool

    def policy(self, params: Any) -> Policy:
        """The policy with `params`, as `envs.run_episode` takes it."""
        network = functools.partial(self.network.apply, params)
        recurrent = self.memory is not None
        return envs.network_policy(self.environment, network, sampled=self.sampled, recurrent=recurrent, flatten=False)

    @property
    def memory(self) -> Any:
        """What a recurrent policy remembers before the first step, of every agent; None: the policy has no memory."""
        return initial_memory(self.network, self.environment)

    def play(self, params: Any, statistics: envs.ObservationStatistics, key: Array, *, episodes: int) -> envs.Episode:
        """Run episodes of the policy with `params`; results have a leading axis of `episodes`."""
        known = statistics if self.normalise else None
        policy, memory = self.policy(params), self.memory
        return envs.run_episodes(self.environment, policy, key=key, episodes=episodes, statistics=known, memory=memory)

    def init_params(self, *, key: Array) -> Any:
        """Draw initial parameters of the policy."""
        return init_network(self.network, self.environment, key=key)


class Keys(NamedTuple):
    """The random keys of one seed, by purpose."""

    init: Array
    training: Array
    checks: Array
    evaluation: Array
    random: Array  # of the random policy


def seed_keys(seed: int) -> Keys:
    """Return the keys of a seed."""
    return Keys(*jax.random.split(jax.random.key(seed), len(Keys._fields)))


class Trained(NamedTuple):
    """Result of a run of any algorithm."""

    params: Any  # of the policy network; None: the random policy
    statistics: envs.ObservationStatistics
    generations: int  # PPO: updates
    generation_seconds: float  # median
    env_steps: int
    invalid: int  # members whose fitness was not finite; PPO: steps whose reward or observation was not
    advice: str = ""  # what to change, should nothing have been learned


class Evaluation:
    """Mean returns over fresh episodes, compiled once for all seeds of a task."""

    def __init__(self, task: Task, *, episodes: int):
        self.task = task
        self._play: Callable = jax.jit(functools.partial(task.play, episodes=episodes))
        self._uniform: Callable = jax.jit(functools.partial(play_uniform, task.environment, episodes=episodes))

    def returns(self, params: Any, statistics: envs.ObservationStatistics, *, key: Array) -> Array:
        """Returns of `params`, float32 [episodes]."""
        return self._play(params, statistics, key).total_reward

    def mean_return(self, params: Any, statistics: envs.ObservationStatistics, *, key: Array) -> float:
        """Mean return of `params`."""
        return float(self.returns(params, statistics, key=key).mean())

    def random_returns(self, *, key: Array) -> Array:
        """Returns of uniformly drawn actions, float32 [episodes]."""
        return self._uniform(key=key).total_reward


def is_above(returns: Array, others: Array) -> bool:
    """Whether the mean of some returns is above that of others by more than two standard errors of their difference."""
    error = math.sqrt(sum(float(values.var()) / values.size for values in (returns, others)))
    return float(returns.mean() - others.mean()) > 2 * error


class HeldOutChecks:
    """Judges the parameters of one run on held-out episodes, evenly spaced in environment steps.

    Args:
        evaluation: of the task.
        key: of all checks.
        every: environment steps between them.
        target: mean return to reach; None: never.
    """

    def __init__(self, evaluation: Evaluation, *, key: Array, every: float, target: float | None):
        self.met = False  # whether the last check reached the target
        self.done = 0  # the number of the last check
        self._evaluation, self._key, self._every, self._target = evaluation, key, every, target

    def __call__(self, params: Any, statistics: envs.ObservationStatistics, *, env_steps: int) -> dict[str, float]:
        """Return {"held_out_return": mean return} if a check is due, else {}."""
        due = math.floor(env_steps / self._every)
        if due <= self.done:
            return {}
        self.done = due
        key = jax.random.fold_in(self._key, due)
        mean_return = self._evaluation.mean_return(params, statistics, key=key)
        self.met = self._target is not None and mean_return >= self._target
        return {"held_out_return": mean_return}
