"""Rollouts of an actor and a critic, and their advantages.

    delta_t = r_t + gamma V(s_{t+1}) (1 - terminated_t) - V(s_t)
    A_t     = delta_t + gamma lambda (1 - done_t) A_{t+1}

At the end of an episode s_{t+1} is its last observation; truncated episodes are bootstrapped, terminated ones are not.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from eggroll import envs
from eggroll.envs.normalisation import ObservationStatistics, is_finite
from eggroll.experiments.rl.distributions import log_prob_and_entropy, num_log_stds, sample, to_action
from eggroll.experiments.rl.networks import init_network


class Lanes(NamedTuple):
    """Environments stepped in parallel; every leaf has a leading axis [num_envs]."""

    observation: Array
    state: Any
    episode_return: Array  # float32, undiscounted, so far
    discounted_return: Array  # float32, sum of gamma^k r_{t-k} of this episode


class Step(NamedTuple):
    """Record of one step; stacked to [T, num_envs, ...]."""

    observation: Array  # as the policy saw it
    centred: Array  # observation - mean of the statistics in use
    raw_action: Array
    mask: Array | None
    log_prob: Array
    value: Array
    next_value: Array  # of the observation that followed, before a reset
    reward: Array
    terminated: Array
    done: Array  # terminated or truncated
    invalid: Array  # the reward or the square of an observation was not finite; counts as terminated with reward 0
    discounted_return: Array
    episode_return: Array  # so far; of the whole episode where done


@dataclasses.dataclass(frozen=True)
class ActorCritic:
    """A policy network and a value network in an environment; every method is pure."""

    environment: envs.Environment  # with a time limit
    actor: nn.Module  # called for every agent of `PerAgent`
    critic: nn.Module  # reads the whole observation, of all agents
    normalise: bool

    def init(self, key: Array) -> dict[str, Any]:
        """Draw initial parameters {"actor", "critic", "log_std"}."""
        actor_key, critic_key = jax.random.split(key)
        return {
            "actor": init_network(self.actor, self.environment, key=actor_key),
            "critic": self.critic.init(critic_key, jnp.zeros(self.environment.observation_shape, jnp.float32)),
            "log_std": jnp.zeros(num_log_stds(self.environment.action_space), jnp.float32),
        }

    def see(self, statistics: ObservationStatistics, observation: Array) -> Array:
        """Normalise an observation if so configured."""
        return envs.normalise(statistics, observation) if self.normalise else observation

    def output(self, params: Any, observation: Array) -> Any:
        """Output of the policy network, [output_size] or [agents, output_size]."""
        space, apply = self.environment.action_space, functools.partial(self.actor.apply, params["actor"])
        if isinstance(space, envs.PerAgent):
            return jax.vmap(apply)(observation)
        return apply(observation)

    def value(self, params: Any, observation: Array) -> Array:
        """Value of an observation, []."""
        value: Any = self.critic.apply(params["critic"], observation)
        return value[0]

    def judge(self, params: Any, step: Step) -> tuple[Array, Array, Array]:
        """Log probability of the step's action, entropy and value under `params`, [] each."""
        output, space = self.output(params, step.observation), self.environment.action_space
        chosen = log_prob_and_entropy(space, output, params["log_std"], step.raw_action, mask=step.mask)
        return *chosen, self.value(params, step.observation)


def reset(environment: envs.Environment, *, num_envs: int, key: Array) -> Lanes:
    """Start `num_envs` episodes."""
    observation, state = jax.vmap(environment.reset)(jax.random.split(key, num_envs))
    return Lanes(observation, state, jnp.zeros(num_envs, jnp.float32), jnp.zeros(num_envs, jnp.float32))


def collect(
    model: ActorCritic, params: Any, lanes: Lanes, *, statistics: ObservationStatistics, steps: int, gamma: float, key: Array
) -> tuple[Lanes, Step]:
    """Step every environment `steps` times.

    A finished environment continues from a start out of a pool of num_envs, drawn for each rollout: a reset in every step,
    mostly discarded, costs more than the step itself in some suites.

    Args:
        model: acts.
        params: its parameters.
        lanes: from `reset` or the last rollout.
        statistics: of observations, fixed within the rollout.
        steps: T.
        gamma: discount of `discounted_return`.
        key: consumed.

    Returns:
        The lanes after the rollout and its steps, [T, num_envs, ...].
    """
    pool_key, steps_key = jax.random.split(key)
    num_envs = lanes.episode_return.shape[0]
    pool = reset(model.environment, num_envs=num_envs, key=pool_key)

    def one(lane: Lanes, key: Array) -> tuple[Lanes, Step]:
        act_key, start_key = jax.random.split(key)
        advanced, step = _step(model, params, lane, statistics=statistics, gamma=gamma, key=act_key)
        start = jax.tree.map(lambda x: x[jax.random.randint(start_key, (), 0, num_envs)], pool)
        return jax.tree.map(lambda new, old: jnp.where(step.done, new, old), start, advanced), step

    def advance(lanes: Lanes, key: Array) -> tuple[Lanes, Step]:
        return jax.vmap(one)(lanes, jax.random.split(key, num_envs))

    return jax.lax.scan(advance, lanes, jax.random.split(steps_key, steps))


def _step(
    model: ActorCritic, params: Any, lane: Lanes, *, statistics: ObservationStatistics, gamma: float, key: Array
) -> tuple[Lanes, Step]:
    """One step of one environment, without a reset."""
    action_key, step_key = jax.random.split(key)
    environment, log_std = model.environment, params["log_std"]
    mask = None if environment.action_mask is None else environment.action_mask(lane.state)
    sound = is_finite(lane.observation)
    observation = jnp.where(sound, lane.observation, statistics.mean)
    seen = model.see(statistics, observation)
    output = model.output(params, seen)
    raw = sample(environment.action_space, output, log_std, key=action_key, mask=mask)
    log_prob, _ = log_prob_and_entropy(environment.action_space, output, log_std, raw, mask=mask)
    after = environment.step(step_key, lane.state, to_action(environment.action_space, raw))
    finite = sound & jnp.isfinite(after.reward) & is_finite(after.observation)
    reward, terminated = jnp.where(finite, after.reward, 0.0), after.terminated | ~finite
    episode_return, discounted_return = lane.episode_return + reward, gamma * lane.discounted_return + reward
    step = Step(
        observation=seen,
        centred=observation - statistics.mean,
        raw_action=raw,
        mask=mask,
        log_prob=log_prob,
        value=model.value(params, seen),
        next_value=model.value(params, model.see(statistics, after.observation)),
        reward=reward,
        terminated=terminated,
        done=terminated | after.truncated,
        invalid=~finite,
        discounted_return=discounted_return,
        episode_return=episode_return,
    )
    return Lanes(after.observation, after.state, episode_return, discounted_return), step


def advantages(steps: Step, *, gamma: float, gae_lambda: float, reward_scale: Array | float = 1.0) -> Array:
    """Estimate advantages (Schulman et al., arXiv 1506.02438, equation 16).

    Args:
        steps: leaves [T, ...].
        gamma: discount.
        gae_lambda: 0: one-step errors; 1: whole returns minus values.
        reward_scale: factor of the rewards.

    Returns:
        float32 [T, ...].
    """
    delta = steps.reward * reward_scale + gamma * jnp.where(steps.terminated, 0.0, steps.next_value) - steps.value

    def back(following: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        delta, done = now
        advantage = delta + gamma * gae_lambda * jnp.where(done, 0.0, following)
        return advantage, advantage

    return jax.lax.scan(back, jnp.zeros_like(delta[0]), (delta, steps.done), reverse=True)[1]
