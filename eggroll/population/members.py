"""`Population`: the members of one generation as addresses, for fitness that is computed outside JAX (ask and tell)."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from eggroll.lazy.dense import dense_sum, perturb_dense
from eggroll.lazy.low_rank import perturb
from eggroll.lazy.quantised import OffGrid, perturb_integers
from eggroll.noise import integer
from eggroll.noise.draws import Drawn, Undrawn, build_noise, draw_pair
from eggroll.noise.factored import BuiltLeaf, FactoredLeaf
from eggroll.noise.integer import IntegerNoise
from eggroll.noise.leaves import DenseLeaf, LeafPlan, PerturbedLeaf, at_least_float32
from eggroll.noise.once import computed_once
from eggroll.noise.plan import Plan
from eggroll.population.layout import Scalars


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
        if not isinstance(index, jax.core.Tracer) and not 0 <= int(index) < self.size:
            raise ValueError(f"index must be in [0, {self.size}), got {index}.")
        return self._member(index)


def build_member(plan: Plan, params: Any, index: Array | int, scalars: Scalars) -> Any:
    """Build the parameters of one member.

    Args:
        plan: the plan of `params`.
        params: unperturbed parameters.
        index: int32, in [0, N).
        scalars: of the generation.

    Returns:
        A pytree like `params`.
    """
    pair, is_minus = jnp.divmod(jnp.asarray(index, jnp.int32), 2)
    sign = 1 - 2 * is_minus if plan.is_integer else 1.0 - 2.0 * is_minus.astype(jnp.float32)
    noise = draw_pair(plan, scalars.noise_key, scalars.noise_generation, pair)
    return member_params(plan, params, noise, sign=sign, sigma=scalars.sigma, lazy=False)


def check_coefficients(coefficients: Any, *, population_size: int) -> Array:
    """Return coefficients of pairs as float32 [P]; ValueError for another shape."""
    coefficients = jnp.asarray(coefficients, jnp.float32)
    if coefficients.shape != (population_size // 2,):
        raise ValueError(f"coefficients must have shape ({population_size // 2},), got {coefficients.shape}.")
    return coefficients


def member_params(
    plan: Plan,
    params: Any,
    pair_noise: list[Drawn | None],
    *,
    sign: Array,
    sigma: Array | None,
    lazy: bool = True,
) -> Any:
    """Parameters of one member: theta + sign sigma E, sigma times each leaf's `sigma_multiplier`.

    Args:
        plan: the plan.
        params: the parameters.
        pair_noise: per leaf, its noise from `draw_pair`, None when frozen.
        sign: +1 or -1, int32 for integer noise.
        sigma: standard deviation; None for integer noise, whose spec sets it.
        lazy: keep leaves with factors as `PerturbedArray`; False builds them (the dense oracle), quantised ones as floats.

    Returns:
        A pytree like `params`.
    """

    def member_leaf(planned: LeafPlan, leaf: Array, drawn: Any) -> Any:
        if not isinstance(planned, PerturbedLeaf):
            return leaf
        if planned.integer:
            return _integer_leaf(planned, planned.integer, leaf, drawn, sign, lazy=lazy)
        assert sigma is not None
        amplitude = sign * sigma * planned.sigma_multiplier
        if not isinstance(planned, FactoredLeaf):
            if isinstance(drawn, Undrawn):
                assert isinstance(planned, DenseLeaf)
                return perturb_dense(planned, leaf, drawn.keys, amplitude)
            total = dense_sum(leaf, drawn, amplitude, planned.noise_dtype)
            total = computed_once(total) if leaf.ndim == 1 else total  # a vector is read again for every input of the member
            return OffGrid(total, planned.path) if planned.quantised and lazy else total
        scale = amplitude / math.sqrt(planned.rank)
        if not lazy or isinstance(planned, BuiltLeaf):
            wide = at_least_float32(leaf.dtype)
            built = scale * build_noise(planned, drawn).astype(wide)
            if planned.quantised:
                return perturb_integers(leaf, built, planned.noise_dtype)
            return (leaf.astype(wide) + built).astype(leaf.dtype)
        return perturb(planned, leaf, drawn, scale=jnp.broadcast_to(scale, planned.sizes(planned.stack)))

    leaves = [member_leaf(*leaf) for leaf in zip(plan.leaves, jax.tree.leaves(params), pair_noise, strict=True)]
    return jax.tree.unflatten(plan.tree, leaves)


def _integer_leaf(planned: PerturbedLeaf, noise: IntegerNoise, leaf: Array, drawn: Any, sign: Array, *, lazy: bool) -> Any:
    if not isinstance(planned, FactoredLeaf):
        return integer.saturate(leaf.astype(jnp.int32) + noise.rescale(drawn.astype(jnp.int32) * sign))
    if not lazy:
        raise ValueError(
            f"int8 parameter '{planned.path}' of one member cannot be built: its perturbation is finer than an integer; "
            "use Population.apply."
        )
    return perturb(planned, leaf, drawn, scale=jnp.broadcast_to(sign, planned.sizes(planned.stack)))
