"""Episodes of one policy in one environment, as a loop that stops at the end of the episode.

Under `vmap` the loop runs until the last episode of the batch ends, so a population that fails early costs little. A reward
that is not finite, or an observation whose square is not, ends the episode with a NaN return. Environment states are not kept
after the loop.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from eggroll.envs.checks import check_environment, check_policy, check_recurrent
from eggroll.envs.normalisation import (
    ObservationStatistics,
    ObservationSums,
    add_observation,
    initial_sums,
    is_finite,
    normalise,
)
from eggroll.envs.protocol import Environment

# (observation, key) -> action; with a memory (memory, observation, key) -> (memory, action). If the environment has an
# action mask, it is the last argument. `envs.network_policy` makes either from a network.
Policy = Callable[..., Any]


class Episode(NamedTuple):
    """One finished episode, or several with a leading axis."""

    total_reward: Array  # float32 [], sum of rewards, NaN if one of them or the square of an observation was not finite
    steps: Array  # int32 []
    sums: ObservationSums  # of the observations acted upon, around the mean of the statistics in use, or 0


class _Carry(NamedTuple):
    observation: Array
    state: Any
    memory: Any
    episode: Episode
    done: Array  # bool []


def run_episode(
    environment: Environment,
    policy: Policy,
    *,
    key: Array,
    statistics: ObservationStatistics | None = None,
    normalised: bool = True,
    memory: Any = None,
) -> Episode:
    """Run one episode.

    Args:
        environment: from `envs.make`.
        policy: `policy(observation, key) -> action`; ignore the key to act deterministically. With an `action_mask` of the
            environment it is called `policy(observation, key, mask)`.
        key: consumed.
        statistics: normalise the observations that the policy reads; None: not normalised.
        normalised: False: the policy reads observations as they are, and only the sums are around the mean of `statistics`.
        memory: initial memory of a recurrent policy, a pytree; the policy is then called
            `policy(memory, observation, key) -> (memory, action)`, with the mask last. None: the policy has no memory.

    Returns:
        The `Episode`.

    Raises:
        TypeError: a function of the environment, or the policy, takes other arguments.
        ValueError: a result of theirs is not what `Environment` describes; the message names it.
    """
    check_environment(environment)
    check_policy(environment, policy, recurrent=memory is not None)
    reset_key, steps_key = jax.random.split(key)
    centre = jnp.float32(0) if statistics is None else statistics.mean

    def act(carry: _Carry, key: Array) -> tuple[Any, Array]:
        seen = normalise(statistics, carry.observation) if statistics is not None and normalised else carry.observation
        mask = () if environment.action_mask is None else (environment.action_mask(carry.state),)
        if memory is None:
            return None, policy(seen, key, *mask)
        result = policy(carry.memory, seen, key, *mask)
        check_recurrent(carry.memory, result)
        return result

    def advance(carry: _Carry) -> _Carry:
        action_key, step_key = jax.random.split(jax.random.fold_in(steps_key, carry.episode.steps))
        new_memory, action = act(carry, action_key)
        observation, state, reward, terminated, truncated = environment.step(step_key, carry.state, action)
        reward = jnp.asarray(reward).astype(jnp.float32)
        finite = jnp.isfinite(reward) & is_finite(observation) & is_finite(carry.observation)
        episode = Episode(
            carry.episode.total_reward + jnp.where(finite, reward, jnp.nan),
            carry.episode.steps + 1,
            add_observation(carry.episode.sums, carry.observation, centre=centre),
        )
        return _Carry(observation, state, new_memory, episode, terminated | truncated | ~finite)

    def running(carry: _Carry) -> Array:
        return ~carry.done & (carry.episode.steps < environment.max_steps)

    observation, state = environment.reset(reset_key)
    empty = Episode(jnp.float32(0), jnp.int32(0), initial_sums(environment.observation_shape))
    start = _Carry(observation, state, memory, empty, jnp.bool_(False))
    return jax.lax.while_loop(running, advance, start).episode


def run_episodes(
    environment: Environment,
    policy: Policy,
    *,
    key: Array,
    episodes: int,
    statistics: ObservationStatistics | None = None,
    normalised: bool = True,
    memory: Any = None,
) -> Episode:
    """Run several episodes in parallel; like `run_episode`, with a leading axis of `episodes` in the result.

    Every episode starts with the same `memory`.

    Raises:
        TypeError, ValueError: `episodes` is not a positive integer, or as for `run_episode`.
    """
    if not isinstance(episodes, int) or episodes < 1:
        raise ValueError(f"episodes must be an integer >= 1, got {episodes!r}.")

    def run(key: Array) -> Episode:
        return run_episode(environment, policy, key=key, statistics=statistics, normalised=normalised, memory=memory)

    return jax.vmap(run)(jax.random.split(key, episodes))
