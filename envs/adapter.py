"""Helpers of the adapters: type promotion as suites need it, spaces, and steps as `Transition` with stable types.

Suites rely on implicit promotion, which the caller may forbid. Some return a state with other dtypes than the one they were
given, which a loop cannot carry. Some call `jnp.clip` with keywords that JAX has removed.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from eggroll.envs.protocol import ActionSpace, Continuous, Discrete, Transition


@contextlib.contextmanager
def promotion_allowed() -> Iterator[None]:
    """Allow promotion of types and ranks, as jax does by default, while a suite's code runs."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def as_arrays(state: Any) -> Any:
    """Return a state whose leaves are all arrays."""
    return jax.tree.map(jnp.asarray, state)


def shapes_at_reset(reset: Callable[[Array], Any]) -> Any:
    """Return the shapes and dtypes of what `reset(key)` gives, as `jax.eval_shape` does."""
    with promotion_allowed():
        return jax.eval_shape(reset, jax.eval_shape(lambda: jax.random.key(0)))


def flat_float32(tree: Any) -> Array:
    """Return the leaves of a pytree as one float32 vector, in the order of `jax.tree.leaves`."""
    return jnp.concatenate([jnp.asarray(leaf).astype(jnp.float32).reshape(-1) for leaf in jax.tree.leaves(tree)])


def box(low: Any, high: Any, shape: tuple[int, ...]) -> Continuous:
    """Return the space of float32 [*shape] between bounds that broadcast to that shape."""
    return Continuous(tuple(shape), *(np.broadcast_to(np.asarray(bound, np.float32), shape) for bound in (low, high)))


def discrete_or_box(space: Any, *, name: str) -> ActionSpace:
    """Convert an action space of gymnax, which has `n`, or `low`, `high` and `shape`; `name` is for the error.

    Raises:
        ValueError: it is neither.
    """
    if hasattr(space, "n"):
        return Discrete(int(space.n))
    if hasattr(space, "low"):
        return box(space.low, space.high, space.shape)
    raise ValueError(f"env '{name}' has a {type(space).__name__} action space, expected a discrete one or a box.")


def transition(old_state: Any, observation: Array, state: Any, reward: Any, terminated: Any, truncated: Any) -> Transition:
    """Convert the result of a suite's step to a `Transition`; `state` gets the dtypes of `old_state`."""
    state = jax.tree.map(lambda old, new: new if new is old else jnp.asarray(new, old.dtype), old_state, state)
    reward = jnp.asarray(reward).astype(jnp.float32).reshape(())
    flags = (jnp.asarray(terminated, bool), jnp.asarray(truncated, bool))
    return Transition(observation.astype(jnp.float32), state, reward, *flags)


def step_with_clock(env: Any, params: Any) -> Callable[[Array, Any, Array], Transition]:
    """Return a step from `env.step_env`, whose one flag for all ends is split by `timestep` and `params.max_timesteps`."""

    def step(key: Array, state: Any, action: Array) -> Transition:
        with promotion_allowed():
            observation, new_state, reward, done, _ = env.step_env(key, state, action, params)
            late = new_state.timestep >= params.max_timesteps
        return transition(state, observation, new_state, reward, done & ~late, done & late)

    return step


def split_variant(name: str, variants: tuple[str, ...], *, suite: str) -> tuple[str, str]:
    """Split "name@variant"; the default is the first of `variants`. `suite` is for the error.

    Raises:
        ValueError: there is no such variant.
    """
    base, _, variant = name.partition("@")
    if variant and variant not in variants:
        raise ValueError(
            f"env '{suite}/{name}' must have one of the variants {', '.join('@' + v for v in variants)}, got '@{variant}'."
        )
    return base, variant or variants[0]


class _OldClip:
    """`jax.numpy` whose `clip` takes `a_min` and `a_max` as well."""

    def __getattr__(self, name: str) -> Any:
        return getattr(jnp, name)

    @staticmethod
    def clip(*args: Any, **kwargs: Any) -> Array:
        """Clip, the old keywords renamed."""
        return jnp.clip(*args, **{{"a_min": "min", "a_max": "max"}.get(name, name): value for name, value in kwargs.items()})


def allow_old_clip(module: ModuleType, name: str) -> None:
    """Let a suite's module, which calls jax.numpy `name`, use `clip(a_min=, a_max=)`; no other module sees it."""
    if "a_min" not in inspect.signature(jnp.clip).parameters:
        setattr(module, name, _OldClip())
