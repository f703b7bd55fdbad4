"""Adapter of navix: "DoorKey-8x8-v0" or "Navix-DoorKey-8x8-v0", "FourRooms-v0", ...

Observations are navix's symbolic grid, [height, width, 3] (what, colour, state), or as the environment was registered.
The reward is 1 at the goal and 0 elsewhere; episodes are truncated after navix's default of 100 steps.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array

from eggroll.envs.adapter import as_arrays, box, promotion_allowed, shapes_at_reset, transition
from eggroll.envs.drawing import drawing
from eggroll.envs.protocol import ActionSpace, Discrete, Environment, Transition

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
        The `Environment`; its step ignores the key, since navix keeps one in its state.
    """

    def reset(key: Array) -> tuple[Array, Any]:
        with promotion_allowed():
            timestep = as_arrays(env.reset(key))
        return timestep.observation.astype(jnp.float32), timestep

    def step(key: Array, state: Any, action: Array) -> Transition:
        with promotion_allowed():
            new = env._step(state, action.astype(state.action.dtype))  # `step` resets ended ones
            terminated, truncated = new.is_termination(), new.is_truncation()
        return transition(state, new.observation, new, new.reward, terminated, truncated)

    return Environment(
        name,
        reset=reset,
        step=step,
        observation_shape=shapes_at_reset(reset)[0].shape,
        action_space=_action_space(env.action_space),
        max_steps=int(env.max_steps),
        draw=drawing.navix,
    )


def _action_space(space: Any) -> ActionSpace:
    if jnp.issubdtype(space.dtype, jnp.integer):
        return Discrete(int(space.n))
    return box(space.minimum, space.maximum, space.shape)
