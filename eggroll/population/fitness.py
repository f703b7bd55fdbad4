"""The user's fitness function: what it is given for one member, and what it may return.

fitness(params, batch, key[, member_state]) -> fitness | (fitness, aux) | (fitness, member_state) | (fitness, aux, member_state)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from eggroll.noise.leaves import at_least_float32
from eggroll.signatures import check_signature


def normalise_fitness(fitness: Callable | None, *, has_aux: bool, integers: bool = False) -> Callable:
    """Give every kind of fitness function one signature.

    Args:
        fitness: the user's function.
        has_aux: whether it returns an aux.
        integers: whether its value may be an integer.

    Returns:
        `function(params, batch, key, member_state) -> (fitness, aux or None, member state or None)`; the fitness is at least
        float32, or int32.

    Raises:
        ValueError: there is no fitness function.
    """
    if fitness is None:
        raise ValueError("fitness is None; give EvolutionStrategy a fitness function, or use ask and tell.")

    def function(params: Any, batch: Any, key: Array, member_state: Any) -> tuple[Array, Any, Any]:
        has_state = member_state is not None
        check_signature("fitness", fitness, ("params", "batch", "key", *["member_state"] * has_state))
        result = fitness(params, batch, key, *((member_state,) if has_state else ()))
        parts = _checked_parts(result, has_aux=has_aux, has_state=has_state, integers=integers)
        if has_state:
            _check_state(member_state, parts[-1])
        dtype = at_least_float32(parts[0].dtype) if jnp.issubdtype(parts[0].dtype, jnp.floating) else jnp.int32
        return parts[0].astype(dtype), parts[1] if has_aux else None, parts[-1] if has_state else None

    return function


def _check_state(old: Any, new: Any) -> None:
    before, after = ([jax.tree.structure(tree), *map(jax.typeof, jax.tree.leaves(tree))] for tree in (old, new))
    if [str(part) for part in before] != [str(part) for part in after]:
        raise ValueError(f"fitness must return member_state as it came, {before[1:]}, got {after[1:]} ({after[0]}).")


def _checked_parts(result: Any, *, has_aux: bool, has_state: bool, integers: bool) -> tuple:
    expected = ["fitness"] + ["aux"] * has_aux + ["member_state"] * has_state
    parts = result if isinstance(result, tuple) else (result,)
    if len(parts) != len(expected):
        wanted = expected[0] if len(expected) == 1 else f"({', '.join(expected)})"
        raise ValueError(
            f"fitness must return {wanted}, got {len(parts)} value{'s' * (len(parts) != 1)}; `aux` names the reduction of an "
            "aux, `init(member_state=...)` gives a carried state."
        )
    value = parts[0]
    kinds = (jnp.floating, jnp.signedinteger) if integers else (jnp.floating,)
    is_number = hasattr(value, "dtype") and any(jnp.issubdtype(value.dtype, kind) for kind in kinds)
    if not is_number or len(value.shape) > 1 or value.size == 0:
        described = f"{value.dtype}{list(value.shape)}" if hasattr(value, "dtype") else type(value).__name__
        raise ValueError(f"fitness must return a float scalar, or a float vector over prompts or tasks, got {described}.")
    return parts


def member_arguments(batch: Any, member_state: Any) -> tuple:
    """Abstract `(batch, key, member_state)` of one member; `member_state` has leading axes [P, 2] or is None."""
    one_state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[2:], x.dtype), member_state)
    return batch, jax.eval_shape(lambda: jax.random.key(0)), one_state
