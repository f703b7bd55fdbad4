"""The protocol of environments: pure functions of ONE episode, and a description of their arguments and results.

An adapter (one file per suite) turns a suite's environment into an `Environment`; nothing else knows the suite.
Several agents are one environment: observations [agents, features], actions [agents, ...], one team reward.
"""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array


class Transition(NamedTuple):
    """Result of one step of an environment."""

    observation: Array  # float32 [*observation_shape]
    state: Any  # pytree of the environment
    reward: Array  # float32 []
    terminated: Array  # bool [], the task ended
    truncated: Array  # bool [], the time limit was reached


@dataclasses.dataclass(frozen=True)
class Discrete:
    """Actions 0, ..., n - 1, an int32 scalar."""

    n: int


@dataclasses.dataclass(frozen=True, eq=False)
class Continuous:
    """Actions float32 [*shape] between `low` and `high`, which have that shape and may be infinite."""

    shape: tuple[int, ...]
    low: np.ndarray
    high: np.ndarray


@dataclasses.dataclass(frozen=True)
class MultiDiscrete:
    """Several discrete choices at once: int32 [len(sizes)], choice i being one of 0, ..., sizes[i] - 1."""

    sizes: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class PerAgent:
    """One action of `space` for each of several agents that share a policy, with a leading axis of `agents`."""

    agents: int
    space: Discrete | MultiDiscrete | Continuous


ActionSpace = Discrete | MultiDiscrete | Continuous | PerAgent


@dataclasses.dataclass(frozen=True, eq=False)
class Environment:
    """An environment as pure functions of one episode.

    An episode has at least one step, since `reset` cannot end it.

    Args:
        name: the suite's name for it.
        reset: `reset(key) -> (observation, state)`.
        step: `step(key, state, action) -> Transition`; undefined after the end of an episode.
        observation_shape: shape of one observation; with `PerAgent` actions its first axis is that of agents.
        action_space: `Discrete`, `MultiDiscrete`, `Continuous` or `PerAgent`.
        max_steps: upper limit of the steps of an episode, at least 1.
        action_mask: `action_mask(state) -> bool`, of the shape of the logits that `choose_action` takes, True for the actions
            that are allowed; None: all are.
        draw: `draw(state)`, called outside jit, returns a picture, a numpy array uint8 [height, width, 3]; None: no pictures.

    Raises:
        ValueError: `max_steps` is not an integer, or is less than 1.
    """

    name: str
    _: dataclasses.KW_ONLY
    reset: Callable[[Array], tuple[Array, Any]]
    step: Callable[[Array, Any, Array], Transition]
    observation_shape: tuple[int, ...]
    action_space: ActionSpace
    max_steps: int
    action_mask: Callable[[Any], Array] | None = None
    draw: Callable[[Any], np.ndarray] | None = None

    def __post_init__(self):
        if not is_count(self.max_steps):
            raise ValueError(f"env '{self.name}' must have max_steps, an integer >= 1, got {self.max_steps!r}.")


def is_count(value: Any) -> bool:
    """Whether a value is an integer >= 1, of Python, NumPy or JAX."""
    try:
        return operator.index(value) >= 1
    except TypeError:
        return False


def with_time_limit(environment: Environment, max_steps: int) -> Environment:
    """Truncate the episodes of an environment after `max_steps` steps.

    Args:
        environment: it may still end an episode earlier.
        max_steps: at least 1.

    Returns:
        An `Environment`; its state counts the steps.

    Raises:
        ValueError: `max_steps` is not a positive integer, or above the environment's own limit.
    """
    if not is_count(max_steps):
        raise ValueError(f"max_steps must be an integer >= 1, got {max_steps!r}.")
    if max_steps > environment.max_steps:
        raise ValueError(
            f"max_steps must be at most {environment.max_steps}, where '{environment.name}' ends its episodes, got {max_steps}."
        )
    mask, draw = environment.action_mask, environment.draw

    def reset(key: Array) -> tuple[Array, Any]:
        observation, state = environment.reset(key)
        return observation, (state, jnp.int32(0))

    def step(key: Array, state: Any, action: Array) -> Transition:
        inner = environment.step(key, state[0], action)
        steps = state[1] + 1
        return inner._replace(state=(inner.state, steps), truncated=inner.truncated | (steps >= max_steps))

    return dataclasses.replace(
        environment,
        reset=reset,
        step=step,
        max_steps=max_steps,
        action_mask=None if mask is None else lambda state: mask(state[0]),
        draw=None if draw is None else lambda state: draw(state[0]),
    )
