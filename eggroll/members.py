"""`Population`: the members of one generation as addresses, for fitness that is computed outside JAX (ask and tell)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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


def build_member(plan: Plan, params: Any, index: Array | int, *, key: Array, generation: Array, sigma: Array | None) -> Any:
    """Build the parameters of one member.

    Args:
        plan: the plan of `params`.
        params: unperturbed parameters.
        index: int32, in [0, N).
        key: the run's key.
        generation: int32, generation // noise_reuse.
        sigma: float32, standard deviation of the perturbation; None for int8 parameters.

    Returns:
        A pytree like `params`.
    """
    pair, is_minus = jnp.divmod(jnp.asarray(index, jnp.int32), 2)
    sign = 1 - 2 * is_minus if plan.is_integer else 1.0 - 2.0 * is_minus.astype(jnp.float32)
    return member_params(plan, params, draw_pair(plan, key, generation, pair), sign=sign, sigma=sigma, lazy=False)


def of_params_and_batch(function: Callable) -> Callable:
    """Turn `function(params, batch)` into what a population is evaluated with."""

    def one(params: Any, batch: Any, key: Array, member_state: Any) -> Any:
        return function(params, batch)

    return one


def by_member(run: Callable) -> Callable:
    """Let results with leading axes [P, 2] have one of N."""
    return lambda *given: jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), run(*given))


def checked_coefficients(coefficients: Any, *, population_size: int) -> Array:
    """Return coefficients of pairs as float32 [P]; ValueError for another shape."""
    coefficients = jnp.asarray(coefficients, jnp.float32)
    if coefficients.shape != (population_size // 2,):
        raise ValueError(f"coefficients must have shape ({population_size // 2},), got {coefficients.shape}.")
    return coefficients


def checked_fitness(fitness: Any, pairs: Any, *, population_size: int, integers: bool = False) -> tuple[Array, Array]:
    """Return told fitness as float32 (int32 where `integers` allow and it is) and its pairs as int32 arrays.

    Args:
        fitness: [2 S] or [2 S, K] floats.
        pairs: [S] ints, or None for all.
        population_size: N.
        integers: keep integers as they are.

    Raises:
        ValueError: pairs outside the population or repeated, or a fitness of another length.
    """
    num_pairs = population_size // 2
    chosen = np.arange(num_pairs) if pairs is None else np.asarray(pairs)
    if chosen.ndim != 1 or not chosen.size or not np.isin(chosen, np.arange(num_pairs)).all():
        raise ValueError(f"pairs must be integers in [0, {num_pairs}), at least one, got {pairs!r}.")
    if np.unique(chosen).size != chosen.size:
        raise ValueError(f"pairs must name every pair once, got {pairs!r}.")
    fitness, size = jnp.asarray(fitness), 2 * chosen.size
    whole = integers and jnp.issubdtype(fitness.dtype, jnp.signedinteger)
    fitness = fitness.astype(jnp.int32 if whole else jnp.float32)
    if fitness.ndim not in (1, 2) or fitness.shape[0] != size:
        raise ValueError(f"fitness must have shape ({size},) or ({size}, K), got {fitness.shape}.")
    return fitness, jnp.asarray(chosen, jnp.int32)
