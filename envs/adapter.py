"""What adapters of suites share: the suite's own promotion rules, stable state types, one flat float32 vector.

Suites rely on implicit promotion while the caller may forbid it, some return a state whose types differ from those it was
given, which a loop cannot carry, and some call `jnp.clip` with keywords that jax has removed.
"""

import contextlib
import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


@contextlib.contextmanager
def promotion_allowed() -> Iterator[None]:
    """Allow promotion of types and ranks, as jax does by default, while a suite's code runs."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def as_arrays(state: Any) -> Any:
    """Return a state whose leaves are all arrays."""
    return jax.tree.map(jnp.asarray, state)


def with_types_of(old: Any, new: Any) -> Any:
    """Return the pytree `new` with the dtypes of `old`."""
    return jax.tree.map(lambda old, new: new if new is old else jnp.asarray(new, old.dtype), old, new)


def flat_float32(tree: Any) -> Array:
    """Return the leaves of a pytree as one float32 vector, in the order of `jax.tree.leaves`."""
    return jnp.concatenate([jnp.asarray(leaf).astype(jnp.float32).reshape(-1) for leaf in jax.tree.leaves(tree)])


def scalar_reward(reward: Any) -> Array:
    """Return a reward as float32 []."""
    return jnp.asarray(reward).astype(jnp.float32).reshape(())


def split_variant(name: str, variants: tuple[str, ...], *, suite: str) -> tuple[str, str]:
    """Split "name@variant"; without a variant it is the first of `variants`. The error names the suite.

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
