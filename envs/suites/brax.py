"""Adapter of brax: "ant", "humanoid", "inverted_double_pendulum", ..., with "@generalized", "@positional", "@spring" or "@mjx".

The physics backend is brax's own default, generalized, unless the name has another. Rewards differ between backends, so
returns of different backends cannot be compared. Episodes last 1,000 steps, as in brax's own training; actions lie in [-1, 1].
"""

from typing import Any

from jax import Array

from eggroll.envs.adapter import (
    allow_old_clip,
    as_arrays,
    box,
    flat_float32,
    promotion_allowed,
    shapes_at_reset,
    split_variant,
    transition,
)
from eggroll.envs.drawing import drawing
from eggroll.envs.protocol import Environment, Transition, with_time_limit

BACKENDS = ("generalized", "positional", "spring", "mjx")
EPISODE_LENGTH = 1000


def names() -> list[str]:
    """Return the names of brax's environments."""
    from brax.envs import _envs

    return list(_envs)


def make(name: str) -> Environment:
    """Make a brax environment.

    Args:
        name: one of `names()`, or that and "@backend".

    Returns:
        The `Environment`.

    Raises:
        ValueError: there is no such backend.
    """
    from brax import fluid
    from brax.envs import get_environment

    allow_old_clip(fluid, "jp")
    base, backend = split_variant(name, BACKENDS, suite="brax")
    with promotion_allowed():
        return adapt(get_environment(base, backend=backend), name=f"brax/{name}")


def adapt(env: Any, *, name: str) -> Environment:
    """Adapt a brax environment object.

    Args:
        env: has `reset(key)` and `step(state, action)`, without a wrapper that resets finished episodes.
        name: what to call it.

    Returns:
        The `Environment`; its step ignores the key.
    """

    def reset(key: Array) -> tuple[Array, Any]:
        with promotion_allowed():
            state = as_arrays(env.reset(key))
        return flat_float32(state.obs), state

    def step(key: Array, state: Any, action: Array) -> Transition:
        with promotion_allowed():
            new = env.step(state, action)
        return transition(state, flat_float32(new.obs), new, new.reward, new.done, False)

    environment = Environment(
        name,
        reset=reset,
        step=step,
        observation_shape=shapes_at_reset(reset)[0].shape,
        action_space=box(-1, 1, (int(env.action_size),)),
        max_steps=EPISODE_LENGTH,
        draw=drawing.bodies(env),
    )
    return with_time_limit(environment, EPISODE_LENGTH)
