"""Proximal policy optimisation (Schulman et al., arXiv 1707.06347) on the environments' protocol.

    loss = -E[min(rho A, clip(rho, 1 - c, 1 + c) A)] + c_V E[(V - A - V_old)^2] / 2 - c_H E[entropy],  rho = pi / pi_old

Observations are normalised by the statistics of all earlier rollouts, as in evolution strategies; rewards are divided by the
running standard deviation of the discounted return.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array

from eggroll import envs
from eggroll.envs.normalisation import ObservationStatistics, ObservationSums
from eggroll.experiments.common.options import unless
from eggroll.experiments.rl.collect import ActorCritic, Lanes, Step, advantages, collect, reset


@dataclasses.dataclass(frozen=True)
class PPO:
    """Settings of PPO."""

    num_envs: int = 16
    """Environments stepped in parallel."""
    rollout_steps: int = 128
    """Steps of every environment between updates."""
    epochs: int = 4
    """Passes over a rollout."""
    minibatches: int = 4
    """Minibatches of a pass; divides num_envs * rollout_steps."""
    learning_rate: float = 1e-3
    """Step size of Adam."""
    linear_decay: bool = True
    """Let the step size fall linearly to zero over the run."""
    gamma: float = 0.99
    """Discount."""
    gae_lambda: float = 0.95
    """Decay of the advantage estimate."""
    clip: float = 0.2
    """Range of the probability ratio around 1."""
    value_clip: float | None = None
    """Range of a value's change per update; None: not clipped."""
    value_coefficient: float = 0.5
    """Weight of the value loss."""
    entropy_coefficient: float = 0.01
    """Weight of the entropy bonus."""
    max_gradient_norm: float | None = 0.5
    """Gradients are clipped to this global norm; None: not clipped."""
    normalise_rewards: bool = True
    """Divide rewards by the running standard deviation of the discounted return."""

    @property
    def steps_per_update(self) -> int:
        """Environment steps of a rollout."""
        return self.num_envs * self.rollout_steps

    def check(self) -> None:
        """Raise ValueError for settings that cannot run."""
        for name in ("num_envs", "rollout_steps", "epochs", "minibatches"):
            if getattr(self, name) < 1:
                raise ValueError(f"ppo.{name} must be an integer >= 1, got {getattr(self, name)}.")
        for name in ("learning_rate", "clip", "value_clip", "max_gradient_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"ppo.{name} must be a finite number > 0, got {value}.")
        for name in ("value_coefficient", "entropy_coefficient"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"ppo.{name} must be a finite number >= 0, got {getattr(self, name)}.")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"ppo.{name} must be a number from 0 to 1, got {getattr(self, name)}.")
        steps = self.steps_per_update
        if steps % self.minibatches:
            raise ValueError(f"ppo.minibatches must divide the {steps} steps of a rollout, got {self.minibatches}.")


RULE = unless(  # of `experiments.rl`
    lambda config: config.ppo.epochs * config.ppo.minibatches == 1,
    "with --ppo.epochs 1 and --ppo.minibatches 1: the probability ratio is 1 in the only step on a rollout",
    "ppo.clip",
)


class Learner(NamedTuple):
    """State of the learner."""

    params: Any  # {"actor", "critic", "log_std"}
    opt_state: Any
    statistics: ObservationStatistics
    returns: ObservationStatistics  # of discounted returns, scalars


class Metrics(NamedTuple):
    """Metrics of an update; a run stacks them to [updates]."""

    mean_return: Array  # float32, over episodes that ended in the rollout; NaN if none did
    episodes: Array  # int32, that ended in the rollout
    invalid: Array  # int32, steps whose reward or square of an observation was not finite
    loss: Array  # float32, mean over minibatches


class Run(NamedTuple):
    """A run between two updates: a pytree, from `Trainer.start`."""

    learner: Learner
    lanes: Lanes
    key: Array  # of the next update and all that follow


class Trainer(NamedTuple):
    """A whole run is `start`, then `advance` `updates` times; both are pure, so seeds `vmap`."""

    start: Callable[[Array], Run]  # start(key)
    advance: Callable[[Run], tuple[Run, Metrics]]  # one rollout and the passes over it
    updates: int


def make_trainer(
    config: PPO,
    environment: envs.Environment,
    *,
    actor: nn.Module,
    critic: nn.Module,
    env_steps: int,
    normalise: bool = True,
) -> Trainer:
    """Make the functions of a run.

    Args:
        config: settings.
        environment: from `envs.make`.
        actor: maps an observation to [output_size], as `envs.output_size(space)` says; called for every agent of `PerAgent`.
        critic: maps the flat observation to [1].
        env_steps: steps of the run, all environments together; rounded up to whole rollouts.
        normalise: normalise observations.

    Returns:
        The `Trainer`.

    Raises:
        ValueError: settings that cannot run; the message names them.
    """
    config.check()
    if env_steps < 1:
        raise ValueError(f"env_steps must be an integer >= 1, got {env_steps}.")
    limited = envs.with_time_limit(environment, environment.max_steps)
    updates = -(-env_steps // config.steps_per_update)
    model, optimizer = ActorCritic(limited, actor, critic, normalise), _optimizer(config, updates)

    def start(key: Array) -> Run:
        init_key, reset_key, run_key = jax.random.split(key, 3)
        params = model.init(init_key)
        statistics = envs.initial_statistics(limited.observation_shape), envs.initial_statistics(())
        learner = Learner(params, optimizer.init(params), *statistics)
        return Run(learner, reset(limited, num_envs=config.num_envs, key=reset_key), run_key)

    def advance(run: Run) -> tuple[Run, Metrics]:
        key, update_key = jax.random.split(run.key)
        (learner, lanes), metrics = _update(config, model, optimizer, run.learner, run.lanes, key=update_key)
        return Run(learner, lanes, key), metrics

    return Trainer(start, advance, updates)


def _optimizer(config: PPO, updates: int) -> optax.GradientTransformation:
    steps = updates * config.epochs * config.minibatches
    rate = optax.linear_schedule(config.learning_rate, 0.0, steps) if config.linear_decay else config.learning_rate
    clip = [] if config.max_gradient_norm is None else [optax.clip_by_global_norm(config.max_gradient_norm)]
    return optax.chain(*clip, optax.adam(rate, eps=1e-5))


def _update(
    config: PPO, model: ActorCritic, optimizer: optax.GradientTransformation, learner: Learner, lanes: Lanes, *, key: Array
) -> tuple[tuple[Learner, Lanes], Metrics]:
    """Roll out, then pass over the rollout `epochs` times."""
    rollout_key, epochs_key = jax.random.split(key)
    params, statistics = learner.params, learner.statistics
    lanes, steps = collect(
        model, params, lanes, statistics=statistics, steps=config.rollout_steps, gamma=config.gamma, key=rollout_key
    )
    learner = _merge_statistics(learner, steps)
    scale = _reward_scale(learner.returns) if config.normalise_rewards else 1.0
    advantage = advantages(steps, gamma=config.gamma, gae_lambda=config.gae_lambda, reward_scale=scale)
    data = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (steps, advantage))

    def minibatch(learner: Learner, rows: Array) -> tuple[Learner, Array]:
        batch = jax.tree.map(lambda x: x[rows], data)
        loss, gradient = jax.value_and_grad(ppo_loss)(learner.params, *batch, config=config, model=model)
        updates, opt_state = optimizer.update(gradient, learner.opt_state, learner.params)
        return learner._replace(params=optax.apply_updates(learner.params, updates), opt_state=opt_state), loss

    def epoch(learner: Learner, key: Array) -> tuple[Learner, Array]:
        order = jax.random.permutation(key, config.steps_per_update).reshape(config.minibatches, -1)
        return jax.lax.scan(minibatch, learner, order)

    learner, losses = jax.lax.scan(epoch, learner, jax.random.split(epochs_key, config.epochs))
    return (learner, lanes), _metrics(steps, losses)


def ppo_loss(params: Any, steps: Step, advantage: Array, *, config: PPO, model: ActorCritic) -> Array:
    """Return the loss of a minibatch [B, ...]; its advantages are normalised, the targets of the values are not."""
    log_prob, entropy, value = jax.vmap(lambda step: model.judge(params, step))(steps)
    target = advantage + steps.value
    normalised = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    ratio = jnp.exp(log_prob - steps.log_prob)
    clipped = jnp.clip(ratio, 1.0 - config.clip, 1.0 + config.clip)
    error = jnp.square(value - target)
    if config.value_clip is not None:
        near = steps.value + jnp.clip(value - steps.value, -config.value_clip, config.value_clip)
        error = jnp.maximum(error, jnp.square(near - target))
    policy_loss = -jnp.minimum(ratio * normalised, clipped * normalised).mean()
    return policy_loss + 0.5 * config.value_coefficient * error.mean() - config.entropy_coefficient * entropy.mean()


def _merge_statistics(learner: Learner, steps: Step) -> Learner:
    def sums(deviation: Array) -> ObservationSums:
        number = jnp.float32(deviation.shape[0] * deviation.shape[1])
        return ObservationSums(number, deviation.sum((0, 1)), jnp.square(deviation).sum((0, 1)))

    return learner._replace(
        statistics=envs.merge(learner.statistics, sums(steps.centred)),
        returns=envs.merge(learner.returns, sums(steps.discounted_return - learner.returns.mean)),
    )


def _reward_scale(returns: ObservationStatistics) -> Array:
    return 1.0 / jnp.maximum(jnp.sqrt(returns.m2 / jnp.maximum(returns.number, 1.0)), 1e-4)


def _metrics(steps: Step, losses: Array) -> Metrics:
    ended = steps.done.sum(dtype=jnp.int32)
    total = jnp.where(steps.done, steps.episode_return, 0.0).sum()
    mean_return = jnp.where(ended > 0, total / jnp.maximum(ended, 1).astype(jnp.float32), jnp.nan)
    return Metrics(mean_return, ended, steps.invalid.sum(dtype=jnp.int32), losses.mean())
