"""The random policy: actions drawn uniformly, whatever the observation. Its return is the baseline to exceed."""

import jax
import jax.numpy as jnp
from jax import Array

from eggroll import envs


def uniform_action(space: envs.ActionSpace, *, key: Array, mask: Array | None = None) -> Array:
    """Draw an action uniformly: from all allowed choices, or between the bounds; an axis with an infinite bound is
    standard normal, clipped to the other one.

    Args:
        space: the environment's action space.
        key: consumed.
        mask: bool, of the shape of the logits; None: every action is allowed.

    Returns:
        An action as `envs.choose_action` returns it.
    """
    if isinstance(space, envs.PerAgent):
        keys = jax.random.split(key, space.agents)
        return jax.vmap(lambda key, mask: uniform_action(space.space, key=key, mask=mask))(keys, mask)
    if not isinstance(space, envs.Continuous):
        return envs.choose_action(space, jnp.zeros(envs.output_size(space), jnp.float32), key=key, mask=mask)
    low, high = jnp.asarray(space.low, jnp.float32), jnp.asarray(space.high, jnp.float32)
    bounded = jnp.isfinite(low) & jnp.isfinite(high)
    uniform_key, normal_key = jax.random.split(key)
    outside = jnp.clip(jax.random.normal(normal_key, space.shape), low, high)
    low, width = jnp.where(bounded, low, 0.0), jnp.where(bounded, high - low, 0.0)
    return jnp.where(bounded, low + width * jax.random.uniform(uniform_key, space.shape), outside)


def play_uniform(environment: envs.Environment, *, key: Array, episodes: int) -> envs.Episode:
    """Run episodes of the random policy; results have a leading axis of `episodes`."""

    def policy(observation: Array, key: Array, mask: Array | None = None) -> Array:
        return uniform_action(environment.action_space, key=key, mask=mask)

    return envs.run_episodes(environment, policy, key=key, episodes=episodes)
