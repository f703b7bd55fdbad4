"""Adapter of Kinetix: one fixed level by its path, "s/h1_thrust_over_ball", "m/h17_thrustcontrol_left", "l/hard_pinball", ...

Observations are Kinetix's flat symbolic ones. Actions are a choice for each motor (3) and thruster (2); with "@continuous" a
number for each, with "@discrete" a single choice. Every reset returns the same start. The reward is 1 at the goal, -1 on
failure, and Kinetix's small dense reward for coming nearer.
"""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax import Array

from eggroll.envs.adapter import (
    allow_old_clip,
    as_arrays,
    discrete_or_box,
    promotion_allowed,
    shapes_at_reset,
    split_variant,
    step_with_clock,
)
from eggroll.envs.drawing import drawing
from eggroll.envs.protocol import ActionSpace, Environment, MultiDiscrete

ACTIONS = ("multi_discrete", "continuous", "discrete")


def names() -> list[str]:
    """Return the paths of Kinetix's levels, without ".json"."""
    import kinetix

    folder = Path(kinetix.__file__).parent / "levels"
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.glob("*/*.json"))


def make(name: str) -> Environment:
    """Make an environment of one level of Kinetix.

    Args:
        name: one of `names()`, or that and "@continuous", "@discrete" or "@multi_discrete".

    Returns:
        The `Environment`.

    Raises:
        ValueError: there is no such kind of actions.
    """
    level, actions = split_variant(name, ACTIONS, suite="kinetix")
    from jax2d import collision, engine

    with promotion_allowed():
        from kinetix.environment.env import make_kinetix_env
        from kinetix.environment.spaces import ActionType, ObservationType
        from kinetix.util.saving import load_from_json_file

        allow_old_clip(collision, "jnp")
        allow_old_clip(engine, "jnp")
        start, static_params, params = load_from_json_file(f"{level}.json")
        kinds = (ActionType.from_string(actions), ObservationType.SYMBOLIC_FLAT)
        env = make_kinetix_env(*kinds, lambda key: start, params, static_params, auto_reset=False)
        return adapt(env, params, start=as_arrays(start), name=f"kinetix/{name}")


def adapt(env: Any, params: Any, *, start: Any, name: str) -> Environment:
    """Adapt a Kinetix environment object.

    Args:
        env: has `get_obs`, `step_env` and `action_space`.
        params: the parameters its functions take.
        start: the state that every episode begins with.
        name: what to call it.

    Returns:
        The `Environment`; its reset and step ignore the key.
    """

    def reset(key: Array) -> tuple[Array, Any]:
        with promotion_allowed():
            return env.get_obs(start).astype(jnp.float32), start

    return Environment(
        name,
        reset=reset,
        step=step_with_clock(env, params),
        observation_shape=shapes_at_reset(reset)[0].shape,
        action_space=_action_space(env.action_space(params), name),
        max_steps=int(params.max_timesteps),
        draw=drawing.kinetix(env, params),
    )


def _action_space(space: Any, name: str) -> ActionSpace:
    if hasattr(space, "number_of_dims_per_distribution"):
        return MultiDiscrete(tuple(int(size) for size in space.number_of_dims_per_distribution))
    return discrete_or_box(space, name=name)
