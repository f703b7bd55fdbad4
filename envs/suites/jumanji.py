"""Adapter of jumanji: "Snake-v1", "Game2048-v1", "Knapsack-v1", ...

An observation is one vector of everything in the suite's observation except the action mask, which is
`Environment.action_mask`. Choices that are only allowed jointly become one: cell (row, column) of Minesweeper is action
row * columns + column.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from eggroll.envs.adapter import as_arrays, box, flat_float32, promotion_allowed, shapes_at_reset, transition
from eggroll.envs.drawing import drawing
from eggroll.envs.protocol import ActionSpace, Discrete, Environment, MultiDiscrete, Transition, with_time_limit

EPISODE_LENGTH = 10_000  # of an environment without a limit; a game of 2048 ends earlier


class _State(NamedTuple):
    inner: Any  # jumanji's state
    mask: Array | None  # bool [logits]


def names() -> list[str]:
    """Return the names of jumanji's environments."""
    import jumanji

    return list(jumanji.registered_environments())


def make(name: str) -> Environment:
    """Make a jumanji environment.

    Args:
        name: one of `names()`.

    Returns:
        The `Environment`.
    """
    import jumanji

    with promotion_allowed():
        return adapt(jumanji.make(name), name=f"jumanji/{name}")


def adapt(env: Any, *, name: str) -> Environment:
    """Adapt a jumanji environment object.

    Args:
        env: has `reset(key)`, `step(state, action)`, `action_spec` and perhaps `time_limit`.
        name: what to call it.

    Returns:
        The `Environment`; its step ignores the key.

    Raises:
        ValueError: there is a reward for every agent, or the mask does not fit the actions.
    """
    if env.reward_spec.shape != ():
        raise ValueError(f"env '{name}' has rewards of shape {env.reward_spec.shape}, expected a scalar.")
    _, first = shapes_at_reset(env.reset)
    shown = getattr(first.observation, "action_mask", None)
    space, decode = _action_space(env.action_spec, None if shown is None else shown.shape, name)
    dtype = env.action_spec.dtype

    def reset(key: Array) -> tuple[Array, _State]:
        with promotion_allowed():
            state, timestep = env.reset(key)
        return _observe(timestep.observation), _State(as_arrays(state), _mask(timestep.observation))

    def step(key: Array, state: _State, action: Array) -> Transition:
        with promotion_allowed():
            inner, timestep = env.step(state.inner, decode(action).astype(dtype))
            last, ended = timestep.last(), timestep.discount == 0
        observation, new_state = _observe(timestep.observation), _State(inner, _mask(timestep.observation))
        return transition(state, observation, new_state, timestep.reward, last & ended, last & ~ended)

    environment = Environment(
        name,
        reset=reset,
        step=step,
        observation_shape=shapes_at_reset(reset)[0].shape,
        action_space=space,
        max_steps=int(getattr(env, "time_limit", EPISODE_LENGTH)),
        action_mask=None if shown is None else lambda state: state.mask,
        draw=drawing.jumanji(env),
    )
    return environment if hasattr(env, "time_limit") else with_time_limit(environment, EPISODE_LENGTH)


def _observe(observation: Any) -> Array:
    if hasattr(observation, "_asdict"):
        return flat_float32([value for field, value in observation._asdict().items() if field != "action_mask"])
    return flat_float32(observation)


def _mask(observation: Any) -> Array | None:
    mask = getattr(observation, "action_mask", None)
    return None if mask is None else mask.astype(bool).reshape(-1)


def _action_space(spec: Any, mask_shape: tuple[int, ...] | None, name: str) -> tuple[ActionSpace, Callable[[Array], Array]]:
    """Return the action space, and a function that converts its actions to the suite's."""
    sizes = np.asarray(getattr(spec, "num_values", ()))
    if np.issubdtype(spec.dtype, np.integer) and sizes.size == 0:  # MultiCVRP's bound is one more than its mask has
        sizes = np.full(spec.shape, mask_shape[-1] if mask_shape else np.max(spec.maximum) + 1)
    if sizes.size == 0:
        return box(spec.minimum, spec.maximum, spec.shape), lambda action: action
    if sizes.ndim == 0:
        return Discrete(int(sizes)), lambda action: action
    shape = tuple(int(size) for size in sizes.reshape(-1))
    if mask_shape == shape:
        return Discrete(math.prod(shape)), lambda action: jnp.stack(jnp.unravel_index(action, shape))
    if mask_shape not in (None, (len(shape), shape[0])) or (mask_shape and len(set(shape)) > 1):
        raise ValueError(f"env '{name}' has actions of sizes {shape} with a mask of shape {mask_shape}, which do not fit.")
    return MultiDiscrete(shape), lambda action: action.reshape(sizes.shape)
