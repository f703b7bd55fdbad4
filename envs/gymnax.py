"""Adapter of gymnax, for its 1.0 interface and the 0.0 one before it.

`step_env` gives five values in both; in 1.0 its fourth leaves the time limit out, which `is_truncated` tells. It is preferred
to `step`, which would reset finished episodes and pay for that in every step. An environment that has only `step` gives six
values (1.0) or five (0.0). gymnax relies on implicit promotion, so its code runs with that allowed.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from envs.adapter import as_arrays, promotion_allowed, scalar_reward, with_types_of
from envs.protocol import ActionSpace, Continuous, Discrete, Environment, Transition


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
        return _as_float32(observation, name), as_arrays(state)

    raw_step = _step_env(env, params) if hasattr(env, "step_env") else _step(env, params)

    def step(key: Array, state: Any, action: Array) -> Transition:
        with promotion_allowed():
            observation, new_state, reward, terminated, truncated = raw_step(key, state, action)
        new_state = with_types_of(state, new_state)
        flags = (jnp.asarray(terminated, bool), jnp.asarray(truncated, bool))
        return Transition(_as_float32(observation, name), new_state, scalar_reward(reward), *flags)

    with promotion_allowed():
        space = env.action_space(params)
    observation, _ = jax.eval_shape(reset, jax.eval_shape(lambda: jax.random.key(0)))
    return Environment(
        name,
        reset=reset,
        step=step,
        observation_shape=observation.shape,
        action_space=_action_space(space, name),
        max_steps=int(params.max_steps_in_episode),
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


def _as_float32(observation: Any, name: str) -> Array:
    if not hasattr(observation, "dtype"):
        raise ValueError(f"env '{name}' has observations of type {type(observation).__name__}, expected a single array.")
    return observation.astype(jnp.float32)


def _action_space(space: Any, name: str) -> ActionSpace:
    if hasattr(space, "n"):
        return Discrete(int(space.n))
    if hasattr(space, "low"):
        low, high = (np.broadcast_to(np.asarray(bound, np.float32), space.shape) for bound in (space.low, space.high))
        return Continuous(tuple(space.shape), low, high)
    raise ValueError(f"env '{name}' has a {type(space).__name__} action space, expected a discrete one or a box.")
