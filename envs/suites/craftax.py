"""Adapter of craftax: "Craftax-Symbolic-v1", "Craftax-Classic-Symbolic-v1" and their Pixels forms.

The names of the forms that reset finished episodes automatically ("...-Symbolic-AutoReset-v1") make the same tasks without
that reset, which would generate a world in each step. Episodes are truncated after 10,000 steps in Classic, 100,000 in the
full game; `envs.make(name, max_steps=...)` lowers that.
"""

from typing import Any

from jax import Array

from eggroll.envs.adapter import as_arrays, promotion_allowed, shapes_at_reset, step_with_clock
from eggroll.envs.drawing import drawing
from eggroll.envs.protocol import Discrete, Environment

NAMES = ("Craftax-Symbolic-v1", "Craftax-Classic-Symbolic-v1", "Craftax-Pixels-v1", "Craftax-Classic-Pixels-v1")


def names() -> list[str]:
    """Return the names of craftax's environments."""
    return list(NAMES) + [name.replace("-v1", "-AutoReset-v1") for name in NAMES]


def make(name: str) -> Environment:
    """Make a craftax environment with its default parameters.

    Args:
        name: one of `names()`.

    Returns:
        The `Environment`.
    """
    from craftax.craftax_env import make_craftax_env_from_name

    with promotion_allowed():
        env = make_craftax_env_from_name(name.replace("-AutoReset", ""), auto_reset=False)
        return adapt(env, env.default_params, name=f"craftax/{name}")


def adapt(env: Any, params: Any, *, name: str) -> Environment:
    """Adapt a craftax environment object.

    Args:
        env: has `reset_env`, `step_env` and `num_actions`.
        params: the parameters its functions take.
        name: what to call it.

    Returns:
        The `Environment`.
    """

    def reset(key: Array) -> tuple[Array, Any]:
        with promotion_allowed():
            observation, state = env.reset_env(key, params)
        return observation.astype("float32"), as_arrays(state)

    return Environment(
        name,
        reset=reset,
        step=step_with_clock(env, params),
        observation_shape=shapes_at_reset(reset)[0].shape,
        action_space=Discrete(int(env.num_actions)),
        max_steps=int(params.max_timesteps),
        draw=drawing.craftax,
    )
