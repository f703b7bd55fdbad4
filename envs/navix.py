"""Adapter of navix: "DoorKey-8x8-v0" or "Navix-DoorKey-8x8-v0", "FourRooms-v0", ...

Observations are navix's symbolic grid, [height, width, 3] (what, colour, state), or what the environment's registration says.
The reward is 1 at the goal and 0 elsewhere; episodes are truncated after navix's default of 100 steps.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from envs.adapter import as_arrays, promotion_allowed, scalar_reward, with_types_of
from envs.protocol import ActionSpace, Continuous, Discrete, Environment, Transition

PREFIX = "Navix-"


def names() -> list[str]:
    """Return the names of navix's environments, with and without their prefix."""
    import navix

    full = list(navix.registry())
    return [name.removeprefix(PREFIX) for name in full] + full


def make(name: str) -> Environment:
    """Make a navix environment.

    Args:
        name: one of `names()`.

    Returns:
        The `Environment`.
    """
    import navix

    with promotion_allowed():
        return adapt(navix.make(PREFIX + name.removeprefix(PREFIX)), name=f"navix/{name}")


def adapt(env: Any, *, name: str) -> Environment:
    """Adapt a navix environment object.

    Args:
        env: has `reset(key)`, `step(timestep, action)`, `action_space` and `max_steps`.
        name: what to call it.

    Returns:
        The `Environment`; its step ignores the key, for navix keeps one in its state.
    """

    def reset(key: Array) -> tuple[Array, Any]:
        with promotion_allowed():
            timestep = as_arrays(env.reset(key))
        return timestep.observation.astype(jnp.float32), timestep

    def step(key: Array, state: Any, action: Array) -> Transition:
        with promotion_allowed():
            timestep = with_types_of(state, env._step(state, action.astype(state.action.dtype)))  # `step` resets ended ones
            terminated, truncated = timestep.is_termination(), timestep.is_truncation()
        observation = timestep.observation.astype(jnp.float32)
        return Transition(observation, timestep, scalar_reward(timestep.reward), terminated, truncated)

    observation, _ = jax.eval_shape(reset, jax.eval_shape(lambda: jax.random.key(0)))
    return Environment(
        name,
        reset=reset,
        step=step,
        observation_shape=observation.shape,
        action_space=_action_space(env.action_space),
        max_steps=int(env.max_steps),
    )


def _action_space(space: Any) -> ActionSpace:
    if jnp.issubdtype(space.dtype, jnp.integer):
        return Discrete(int(space.n))
    low, high = (np.broadcast_to(np.asarray(bound, np.float32), space.shape) for bound in (space.minimum, space.maximum))
    return Continuous(tuple(space.shape), low, high)
