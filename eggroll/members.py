"""`Population`: the members of one generation as addresses, for fitness that is computed outside JAX (ask and tell)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from eggroll.plan import Plan
from eggroll.population import draw_pair, member_params


@dataclasses.dataclass(frozen=True)
class Population:
    """The members of one generation; made by `EvolutionStrategy.ask`. Nothing is built until it is asked for."""

    size: int  # N
    _: dataclasses.KW_ONLY
    _apply: Callable
    _member: Callable

    def apply(self, function: Callable, batch: Any = None) -> Any:
        """Apply `function(params, batch)` under every member's perturbation.

        Args:
            function: any JAX function; pass the same object every generation, it is compiled once per object.
            batch: pytree, shared by the members or not as the strategy's `members_per_batch` says.

        Returns:
            The results with a leading axis of N.

        Raises:
            ValueError: the batch lacks its leading axis, or the function uses a parameter against the plan.
        """
        return self._apply(function, batch)

    def member(self, index: Array | int) -> Any:
        """Build the parameters of one member; vmap it for a materialised population.

        Args:
            index: in [0, N); 2 p is pair p with sign +1, 2 p + 1 with sign -1.

        Returns:
            A pytree like the parameters.

        Raises:
            ValueError: no plan yet, or a known index outside the population.
        """
        if isinstance(index, int) and not 0 <= index < self.size:
            raise ValueError(f"index must be in [0, {self.size}), got {index}.")
        return self._member(index)


def build_member(plan: Plan, params: Any, index: Array | int, *, key: Array, generation: Array, sigma: Array) -> Any:
    """Build the parameters of one member.

    Args:
        plan: the plan of `params`.
        params: unperturbed parameters.
        index: int32, in [0, N).
        key: the run's key.
        generation: int32, generation // noise_reuse.
        sigma: float32, standard deviation of the perturbation.

    Returns:
        A pytree like `params`.
    """
    pair, is_minus = jnp.divmod(jnp.asarray(index, jnp.int32), 2)
    sign = 1.0 - 2.0 * is_minus.astype(jnp.float32)
    return member_params(plan, params, draw_pair(plan, key, generation, pair), sign=sign, sigma=sigma, lazy=False)
