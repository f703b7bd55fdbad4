"""A network as a policy: it reads flat features or the observation as it is, and its outputs become an action.

Owns the steps between a network and a rollout (flattening, agents, masks, sampling); it knows no network library.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax import Array

from eggroll.envs.actions import choose_action
from eggroll.envs.protocol import Environment, PerAgent
from eggroll.envs.rollout import Policy


def input_size(environment: Environment) -> int:
    """Return how many features a policy network is given: the size of an observation, of one agent's with `PerAgent`."""
    shape = environment.observation_shape
    return math.prod(shape[1:] if isinstance(environment.action_space, PerAgent) else shape)


def network_policy(
    environment: Environment,
    network: Callable[..., Any],
    *,
    sampled: bool = False,
    recurrent: bool = False,
    flatten: bool = True,
) -> Policy:
    """Make a policy for `run_episode` from a network.

    Args:
        environment: in which it acts; its action mask is respected.
        network: `network(features) -> output`, float32 [input_size] to [output_size], with parameters bound; recurrent:
            `network(memory, features) -> (memory, output)`. With `PerAgent` it is called for every agent (`vmap`), each with
            its own memory: the `memory` of a rollout has a leading axis of agents.
        sampled: sample actions; otherwise act deterministically.
        recurrent: the network has a memory; pass the initial one to `run_episode`.
        flatten: the network reads flat features; otherwise an observation in its shape, with `PerAgent` that of one agent.

    Returns:
        The policy.
    """
    space = environment.action_space
    apply = jax.vmap(network) if isinstance(space, PerAgent) else network

    def features(observation: Array) -> Array:
        if not flatten:
            return observation
        return observation.reshape((space.agents, -1) if isinstance(space, PerAgent) else (-1,))

    def act(output: Array, key: Array, mask: Array | None) -> Array:
        return choose_action(space, output, key=key if sampled else None, mask=mask)

    def policy(observation: Array, key: Array, mask: Array | None = None) -> Array:
        return act(apply(features(observation)), key, mask)

    def recurrent_policy(memory: Any, observation: Array, key: Array, mask: Array | None = None) -> tuple[Any, Array]:
        new_memory, output = apply(memory, features(observation))
        return new_memory, act(output, key, mask)

    return recurrent_policy if recurrent else policy
