"""Adapter of gymnax, for its 1.0 interface and the 0.0 one before it.

`step_env` returns five values in both; in 1.0 the fourth does not include the time limit, which `is_truncated` returns. It is
preferred to `step`, which would reset finished episodes at a cost in each step. The `step` of an environment without
`step_env` returns six values (1.0) or five (0.0).
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from eggroll.envs.adapter import as_arrays, discrete_or_box, promotion_allowed, shapes_at_reset, transition
from eggroll.envs.drawing import drawing
from eggroll.envs.protocol import Environment, Transition


def names() -> list[str]:
    """Return the names of gymnax's environments."""
    import gymnax

    return list(gymnax.registered_envs)


def make(name: str) -> Environment:
    """Make a gymnax environment with its default parameters.

    Args:
        name: one of `names()`.

    Returns:
        The `Environment`.
    """
    import gymnax

    with promotion_allowed():
        env, params = gymnax.make(name)
    return adapt(env, params, name=name)


def adapt(env: Any, params: Any, *, name: str) -> Environment:
    """Adapt a gymnax environment object.

    Args:
        env: has `reset`, `step_env` or `step`, and `action_space` as in gymnax.
        params: the parameters its functions take.
        name: what to call it.

    Returns:
        The `Environment`; observations are float32.

    Raises:
        ValueError: its observation or action space is not a single array.
    """

    def reset(key: Array) -> tuple[Array, Any]:
        with promotion_allowed():
            observation, state = env.reset(key, params)
        if not hasattr(observation, "dtype"):
            raise ValueError(f"env '{name}' has observations of type {type(observation).__name__}, expected a single array.")
        return observation.astype(jnp.float32), as_arrays(state)

    raw_step = _step_env(env, params) if hasattr(env, "step_env") else _step(env, params)

    def step(key: Array, state: Any, action: Array) -> Transition:
        with promotion_allowed():
            made = raw_step(key, state, action)
        return transition(state, *made)

    with promotion_allowed():
        space = env.action_space(params)
    return Environment(
        name,
        reset=reset,
        step=step,
        observation_shape=shapes_at_reset(reset)[0].shape,
        action_space=discrete_or_box(space, name=name),
        max_steps=int(params.max_steps_in_episode),
        draw=drawing.CLASSIC_CONTROL.get(name),
    )


def _step_env(env: Any, params: Any) -> Callable:
    def step(key, state, action):
        observation, state, reward, done, _ = env.step_env(key, state, action, params)
        truncated = env.is_truncated(state, params) if hasattr(env, "is_truncated") else False
        return observation, state, reward, done, truncated

    return step


def _step(env: Any, params: Any) -> Callable:
    def step(key, state, action):
        observation, state, reward, *ends, _ = env.step(key, state, action, params)
        return observation, state, reward, ends[0], ends[1] if len(ends) == 2 else False

    return step
