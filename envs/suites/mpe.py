"""Adapter of JaxMARL's cooperative particle environments: several agents as ONE environment.

    observation  [agents, features + agents]: an agent's own view, zeros up to the longest view, the agent as one-hot
    action       int32 [agents]: `PerAgent` of one discrete choice; all agents share one policy, which reads the one-hot
    mask         bool [agents, actions]: actions that an agent does not have are masked
    reward       the team reward, the mean of the agents' rewards

JaxMARL reports the end of an episode one step late (26 steps instead of 25); this is kept, so that returns are comparable.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from eggroll.envs.adapter import as_arrays, promotion_allowed, shapes_at_reset, transition
from eggroll.envs.drawing import drawing
from eggroll.envs.protocol import Discrete, Environment, PerAgent, Transition

NAMES = ("simple_spread_v3", "simple_speaker_listener_v4", "simple_reference_v3", "simple_v3")


def names() -> list[str]:
    """Return the names of the cooperative environments."""
    return list(NAMES)


def make(name: str) -> Environment:
    """Make a particle environment with discrete actions.

    Args:
        name: one of `names()`.

    Returns:
        The `Environment`.
    """
    import jaxmarl

    with promotion_allowed():
        return adapt(jaxmarl.make(f"MPE_{name}"), name=f"mpe/{name}")


def adapt(env: Any, *, name: str) -> Environment:
    """Adapt a JaxMARL environment object.

    Args:
        env: has `agents`, `reset`, `step_env`, discrete `action_space(agent)` and `max_steps`, and views that are vectors.
        name: what to call it.

    Returns:
        The `Environment`.
    """
    agents = list(env.agents)
    views, _ = shapes_at_reset(env.reset)
    features = max(views[agent].size for agent in agents)
    choices = [int(env.action_space(agent).n) for agent in agents]
    mask = np.arange(max(choices)) < np.array(choices)[:, None]

    def observe(views: dict[str, Array]) -> Array:
        rows = [jnp.pad(views[agent].astype(jnp.float32), (0, features - views[agent].size)) for agent in agents]
        return jnp.concatenate([jnp.stack(rows), jnp.eye(len(agents), dtype=jnp.float32)], axis=1)

    def reset(key: Array) -> tuple[Array, Any]:
        with promotion_allowed():
            views, state = env.reset(key)
        return observe(views), as_arrays(state)

    def step(key: Array, state: Any, action: Array) -> Transition:
        with promotion_allowed():
            views, new_state, rewards, dones, _ = env.step_env(key, state, dict(zip(agents, action, strict=True)))
            reward = jnp.stack([rewards[agent] for agent in agents]).astype(jnp.float32).mean()
        return transition(state, observe(views), new_state, reward, False, dones["__all__"])

    return Environment(
        name,
        reset=reset,
        step=step,
        observation_shape=(len(agents), features + len(agents)),
        action_space=PerAgent(len(agents), Discrete(max(choices))),
        max_steps=int(env.max_steps) + 1,
        action_mask=None if mask.all() else lambda state: jnp.asarray(mask),
        draw=drawing.particles(env),
    )
