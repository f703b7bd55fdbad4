"""Momentum in the subspace that steps share: LOZO-M (arXiv 2410.07698).

    N = b N + (1 - b) c U                       r x m values of a matrix and direction, in place of m x n
    theta -= learning_rate N V^T
    N <- N V_old^T V_new / n, before that       where the right factor V [n, r] has changed

c U V^T is the estimate of the step, U and V the factors that the step perturbed with, drawn again from their addresses. The
projection is the least-squares one with V_new^T V_new taken as its mean, n. Parameters with dense noise have a float32 momentum
of their own size, m = b m + (1 - b) g.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from eggroll.kernels.lowrank_update.reference import lowrank_update
from eggroll.noise.addresses import Factors
from eggroll.noise.draws import draw, from_matrix, leaf_keys
from eggroll.noise.factored import FactoredLeaf, LowRankLeaf
from eggroll.noise.leaves import LeafPlan, PerturbedLeaf
from eggroll.noise.plan import Plan
from eggroll.noise.regions import Region, cut_factors, of_region
from eggroll.update.optimizer import NoiseSource
from eggroll.update.per_block import per_block


class SubspaceMomentum(NamedTuple):
    """State of `subspace_momentum`."""

    generation: Array  # int32 [], of the noise of the last step; -1 before the first
    momenta: dict[str, Array]  # by path, float32: [directions, *stack, r, m], or the parameter's shape where noise is dense


def subspace_momentum(decay: float, plan: Plan, directions: int) -> optax.GradientTransformationExtraArgs:
    """Momentum of the estimate, as an optax transformation, first in a chain.

    Args:
        decay: b in [0, 1).
        plan: of the parameters.
        directions: n, coefficients a step.

    Raises:
        ValueError: a parameter's right factor is new at every step: there is no subspace that steps share. Or its noise is
            neither low-rank nor dense.
    """
    for leaf in plan.leaves:
        if isinstance(leaf, FactoredLeaf) and not isinstance(leaf, LowRankLeaf):
            raise ValueError(f"momentum is for low-rank and dense noise: '{leaf.path}' has Flipout noise.")
        if isinstance(leaf, LowRankLeaf) and leaf.refresh == 1:
            raise ValueError(
                f"momentum lives in the right factors that steps share: '{leaf.path}' needs LowRank(refresh=...) above 1."
            )

    def init(params: Any) -> SubspaceMomentum:
        shapes = {leaf.path: _shape(leaf, directions) for leaf in plan.leaves if isinstance(leaf, PerturbedLeaf)}
        return SubspaceMomentum(jnp.int32(-1), {path: jnp.zeros(shape, jnp.float32) for path, shape in shapes.items()})

    def update(
        updates: Any,
        state: SubspaceMomentum,
        params: Any = None,
        *,
        coefficients: Array,
        sigma: Array,
        noise: NoiseSource,
        **_: Any,
    ) -> Any:
        momenta = dict(state.momenta)

        def move(leaf: LeafPlan, own: Array) -> Array:
            if not isinstance(leaf, PerturbedLeaf):
                return own
            old = state.momenta[leaf.path]
            if not isinstance(leaf, FactoredLeaf):
                momenta[leaf.path] = decay * old + (1 - decay) * own
                return momenta[leaf.path]
            left, right = _factors(leaf, noise, noise.generation, directions)
            descent = -coefficients / (2 * directions * sigma * leaf.sigma_multiplier * math.sqrt(leaf.rank))
            kept = _in_subspace(leaf, old, noise, state.generation, right)
            new = decay * kept + (1 - decay) * descent.reshape((-1,) + (1,) * (left.ndim - 1)) * left
            momenta[leaf.path] = new
            return per_block(functools.partial(_product, leaf), own, new, right)

        moves = noise.map_leaves(move, updates)
        return moves, SubspaceMomentum(noise.generation, momenta)

    return optax.GradientTransformationExtraArgs(init, update)


def _product(leaf: FactoredLeaf, region: Region, momentum: Array, right: Array) -> Array:
    """sum_n N V^T in a region of a parameter."""
    part, factors = of_region(leaf, region), cut_factors(leaf, momentum, right, region)
    assert isinstance(part, FactoredLeaf)
    return from_matrix(part, lowrank_update(jnp.ones(momentum.shape[0]), *factors))


def _shape(leaf: PerturbedLeaf, directions: int) -> tuple[int, ...]:
    if not isinstance(leaf, FactoredLeaf):
        return leaf.shape
    return (directions, *leaf.sizes(leaf.stack), leaf.rank, leaf.matrix[0])


def _factors(leaf: FactoredLeaf, noise: NoiseSource, generation: Array, directions: int) -> tuple[Array, Array]:
    """The factors of a step, float32 [n, *stack, r, rows] and [n, *stack, r, columns]."""
    keys = leaf_keys([leaf], noise.key, generation)

    def of_direction(index: Array) -> tuple[Array, Array]:
        drawn = draw([leaf], keys, index)[0]
        assert isinstance(drawn, Factors)
        left, right = drawn.unpack(leaf.dtype)
        return left.astype(jnp.float32), right.astype(jnp.float32)

    return jax.vmap(of_direction)(jnp.arange(directions, dtype=jnp.int32))


def _in_subspace(leaf: FactoredLeaf, momentum: Array, noise: NoiseSource, last: Array, right: Array) -> Array:
    """The momentum of step `last`, in the subspace of this step."""

    def projected() -> Array:
        _, before = _factors(leaf, noise, last, right.shape[0])
        exact = jax.lax.Precision.HIGHEST
        overlap = jnp.einsum("...rc,...sc->...rs", before, right, precision=exact) / right.shape[-1]
        return jnp.einsum("...rm,...rs->...sm", momentum, overlap, precision=exact)

    changed = (last >= 0) & (last // leaf.refresh != noise.generation // leaf.refresh)
    return jax.lax.cond(changed, projected, lambda: momentum)
