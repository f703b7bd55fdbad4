"""A policy network acting in an environment, which all algorithms train, and its evaluation on fresh episodes."""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax import Array

from eggroll import envs
from eggroll.envs.drawing.render import render_episode
from eggroll.envs.rollout import Policy
from eggroll.experiments.common.checkpoint import load_checkpoint, save_checkpoint, saved_shapes
from eggroll.experiments.rl.config import Config
from eggroll.experiments.rl.networks import init_network, initial_memory
from eggroll.experiments.rl.uniform import play_uniform

BEST, LAST = "best", "checkpoint"  # folders of parameters, in that of the run


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
        return envs.run_episodes(
            self.environment,
            self.policy(params),
            key=key,
            episodes=episodes,
            statistics=statistics,
            normalised=self.normalise,
            memory=self.memory,
        )

    def init_params(self, *, key: Array) -> Any:
        """Draw initial parameters of the policy."""
        return self._init(key=key)

    @functools.cached_property
    def _init(self) -> Callable:
        """One program: what the layers compute of zeros is not needed."""
        return jax.jit(functools.partial(init_network, self.network, self.environment))

    def render(self, params: Any, statistics: envs.ObservationStatistics, path: Path, *, key: Array) -> Path:
        """Draw an episode as an animated GIF; ValueError where the environment cannot be drawn."""
        known = statistics if self.normalise else None
        policy, memory = self.policy(params), self.memory
        drawn = render_episode(self.environment, policy, key=key, path=path, statistics=known, memory=memory)
        if drawn is None:
            raise ValueError("the environment cannot be drawn.")
        return drawn


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
    invalid: int  # members whose fitness was not finite; PPO: steps whose reward, or square of an observation, was not
    checks: "HeldOutChecks | None" = None  # None: the random policy
    unusual: tuple[str, ...] = ()  # numbers of the metrics that the advice is about
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


def save_policy(folder: Path, params: Any, statistics: envs.ObservationStatistics) -> None:
    """Write the parameters of a policy, and the statistics that normalise its observations."""
    save_checkpoint(folder, {"params": params, "statistics": statistics._asdict()})


def load_policy(folder: Path, task: Task) -> tuple[Any, envs.ObservationStatistics]:
    """Read what `save_policy` wrote.

    Raises:
        ValueError: the parameters are missing or damaged, or not those of the task's network and observations.
    """
    statistics = envs.initial_statistics(task.environment.observation_shape)
    like = {"params": task.init_params(key=jax.random.key(0)), "statistics": statistics._asdict()}
    if saved_shapes(folder) != sorted(array.shape for array in jax.tree.leaves(like)):
        raise ValueError(f"the parameters in {folder} do not fit the environment and the network: their shapes differ.")
    saved = load_checkpoint(folder, like)
    return saved["params"], envs.ObservationStatistics(**saved["statistics"])


def is_above(returns: Array, others: Array) -> bool:
    """Whether the mean of some returns is above that of others by more than two standard errors of their difference.

    One return has no standard error: it is never above.
    """
    if min(returns.size, others.size) < 2:
        return False
    error = math.sqrt(sum(float(values.var(ddof=1)) / values.size for values in (returns, others)))
    return float(returns.mean() - others.mean()) > 2 * error


class HeldOutChecks:
    """Judges the parameters of one run on held-out episodes, evenly spaced in environment steps, and keeps the best ones.

    Args:
        evaluation: of the task.
        folder: of the run; its folder `BEST` has the parameters of the best check, the last one of equals.
        config: of the run: how many checks over how many environment steps, and the mean return to reach.
        key: of all checks.
    """

    def __init__(self, evaluation: Evaluation, folder: Path, config: Config, *, key: Array):
        self.met = False  # whether the last check reached the target
        self.done = 0  # the number of the last check
        self.best, self.best_env_steps = -math.inf, 0  # the highest mean return, and when it was reached; 0: never
        self._evaluation, self._folder, self._key, self._target = evaluation, folder, key, config.known_target
        self._checks, self._env_steps = config.checks, config.env_steps

    def steps_to_next(self, env_steps: int) -> int:
        """Return the environment steps that are left, after `env_steps`, until a check is due."""
        return -(-(self.done + 1) * self._env_steps // self._checks) - env_steps

    def __call__(self, params: Any, statistics: envs.ObservationStatistics, *, env_steps: int) -> dict[str, float]:
        """Return {"held_out_return": mean return} if a check is due, else {}."""
        due = env_steps * self._checks // self._env_steps
        if due <= self.done:
            return {}
        self.done = due
        key = jax.random.fold_in(self._key, due)
        mean_return = self._evaluation.mean_return(params, statistics, key=key)
        self.met = self._target is not None and mean_return >= self._target
        if mean_return >= self.best:
            self.best, self.best_env_steps = mean_return, env_steps
            save_policy(self._folder / BEST, params, statistics)
        return {"held_out_return": mean_return}
