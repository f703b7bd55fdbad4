"""The estimator: noise addresses and shaped fitness to a gradient.

    g = 1 / (N sigma) sum_i s_i f_i E_i = 1 / (2 P sigma) sum_p (f_p+ - f_p-) E_p

Pairs are folded first, then every matrix leaf is one float32 matrix product over K = P r, the noise drawn again from its
address. Exactly unbiased for a linear fitness at any rank (EGGROLL, arXiv 2511.16652, Eq. 6, with the 1/sigma kept).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from eggroll.noise import integer
from eggroll.noise.addresses import Factors
from eggroll.noise.draws import LeafKeys, draw, draw_shared, from_matrix, leaf_keys
from eggroll.noise.factored import FactoredLeaf, FlipoutLeaf
from eggroll.noise.leaves import LeafPlan, PerturbedLeaf
from eggroll.noise.plan import Plan
from eggroll.noise.regions import Region, draw_region, draw_shared_region, of_region
from eggroll.update.pair_sums import sum_dtype, sum_over_pairs, weigh
from eggroll.update.shaping import Shaping, integer_coefficients, shape_fitness


def pair_coefficients(shaped: Array) -> Array:
    """Fold antithetic pairs: [N] shaped fitness -> [P] differences f_p+ - f_p-."""
    pairs = shaped.reshape(-1, 2)
    return pairs[:, 0] - pairs[:, 1]


def compute_coefficients(plan: Plan, shaping: str | Shaping, fitness: Array) -> Array:
    """Shape raw fitness [N] or [N, K] and fold pairs: [P], whole numbers for int8 parameters."""
    if plan.is_integer:
        assert isinstance(shaping, str)
        return integer_coefficients(shaping, fitness, largest_noise=_largest_noise(plan))
    return pair_coefficients(shape_fitness(shaping, fitness)).astype(jnp.float32)


def _largest_noise(plan: Plan) -> int:
    return max(leaf.integer.largest for leaf in plan.leaves if leaf.integer)


def check_sums(plan: Plan, *, num_pairs: int) -> None:
    """Raise ValueError unless sums over the pairs of int8 parameters' noise fit int32."""
    if plan.is_integer and num_pairs * _largest_noise(plan) > integer.INT32:
        raise ValueError(
            f"population_size {2 * num_pairs} could overflow the int32 sums over pairs, each up to {_largest_noise(plan)}: "
            f"it must be at most {2 * (integer.INT32 // _largest_noise(plan))}."
        )


def spread_to_all_pairs(plan: Plan, coefficients: Array, pairs: Array, *, num_pairs: int) -> Array:
    """Spread the coefficients [S] of some pairs to [P].

    The others get 0 and these are scaled by P / S, which keeps the mean of the estimate. Coefficients for int8 parameters are
    not scaled: their update depends only on the ratio of each sum to its standard deviation.
    """
    share = 1.0 if plan.is_integer else num_pairs / pairs.shape[0]
    return jnp.zeros(num_pairs, jnp.float32).at[pairs].set(coefficients * share, unique_indices=True)


def gradient(
    plan: Plan,
    coefficients: Array,
    *,
    noise_key: Array,
    noise_generation: Array | int,
    sigma: Array | float | None,
    first_pair: Array | int = 0,
    num_pairs: int | None = None,
    first_index: Array | int = 0,
    first_word: Array | int = 0,
) -> Any:
    """Estimate the gradient of the expected fitness (ascent direction), or some pairs' part of it.

    Of int8 parameters it is the exact sum over the pairs, int32, of products of factors (or of their signs) without a scale.

    Args:
        plan: the plan the population was perturbed by.
        coefficients: float32 [P], differences of shaped fitness from `pair_coefficients`; for int8 parameters int8 or int32
            (`shaping.integer_coefficients`).
        noise_key: the run's key.
        noise_generation: generation // noise_reuse.
        sigma: standard deviation the population was perturbed with; not used for int8 parameters.
        first_pair: index in the population of the first coefficient's pair; the parts of all pairs sum to the gradient.
        num_pairs: P of the whole population; None: the coefficients are of all pairs.
        first_index: stack index of the first layer; nonzero if the plan covers a single layer of a stack.
        first_word: offset of the first word drawn at each address; nonzero if the plan covers a slice of a dense leaf.

    Returns:
        float32 pytree like the parameters, int32 for int8 ones; zeros for frozen leaves.
    """
    keys = leaf_keys(plan.leaves, noise_key, noise_generation)
    count = 2 * (num_pairs or coefficients.shape[0])
    shared = draw_shared(plan, noise_key, noise_generation, first_index=first_index)

    def of_leaf(leaf: LeafPlan, key: LeafKeys, shared: Array | None) -> Array:
        if not isinstance(leaf, PerturbedLeaf):
            return jnp.zeros(leaf.shape, sum_dtype(coefficients))

        def draw_leaf(pair: Array) -> Factors | Array:
            return draw([leaf], [key], pair, first_index=first_index, first_word=first_word)[0]

        return _scaled(leaf, sum_over_pairs(leaf, draw_leaf, coefficients, first_pair), shared, count, sigma)

    return jax.tree.unflatten(plan.tree, [of_leaf(*known) for known in zip(plan.leaves, keys, shared, strict=True)])


def region_gradient(
    leaf: LeafPlan,
    region: Region,
    coefficients: Array,
    *,
    key: LeafKeys,
    noise_key: Array,
    noise_generation: Array | int,
    sigma: Array | float | None,
    first_pair: Array | int = 0,
    num_pairs: int | None = None,
    drawn: Factors | Array | None = None,
    join: Callable[[Array], Array] = lambda total: total,
) -> Array:
    """The gradient in a region of one parameter, of its shape; other arguments as for `gradient`.

    Args:
        leaf: the plan of the parameter.
        region: of the parameter.
        coefficients: [P], or those of some pairs.
        key: of the parameter, from `draws.leaf_keys`.
        noise_key: the run's key.
        noise_generation: generation // noise_reuse.
        sigma: standard deviation the population was perturbed with.
        first_pair: index in the population of the first coefficient's pair.
        num_pairs: P of the whole population; None: the coefficients are of all pairs.
        drawn: noise of all pairs of the whole parameter, if it is drawn already.
        join: sums what several devices have summed over their own pairs.
    """
    part = of_region(leaf, region)
    if not isinstance(leaf, PerturbedLeaf) or not isinstance(part, PerturbedLeaf):
        return jnp.zeros(region.sizes, sum_dtype(coefficients))
    is_whole = region.sizes == leaf.shape

    def draw_part(pair: Array) -> Factors | Array:
        return draw([leaf], [key], pair)[0] if is_whole else draw_region(leaf, key, pair, region)

    if is_whole and drawn is not None:
        total = join(weigh(leaf, drawn, coefficients))
    else:
        total = join(sum_over_pairs(part, draw_part, coefficients, first_pair))
    shared = draw_shared_region(leaf, noise_key, noise_generation, region) if isinstance(leaf, FlipoutLeaf) else None
    return _scaled(part, total, shared, 2 * (num_pairs or coefficients.shape[0]), sigma)


def leaf_gradient(
    leaf: LeafPlan,
    coefficients: Array,
    *,
    noise_key: Array,
    noise_generation: Array | int,
    sigma: Array | float | None,
    first_index: Array | int = 0,
    first_word: Array | int = 0,
) -> Array:
    """The gradient of one parameter, float32; arguments as for `gradient`."""
    return gradient(
        Plan((leaf,), jax.tree.structure(0)),
        coefficients,
        noise_key=noise_key,
        noise_generation=noise_generation,
        sigma=sigma,
        first_index=first_index,
        first_word=first_word,
    )


def _scaled(leaf: LeafPlan, total: Array, shared: Array | None, members: int, sigma: Array | float | None) -> Array:
    """Turn the sum over pairs into the gradient of the leaf."""
    if not isinstance(leaf, PerturbedLeaf):
        return total
    if leaf.integer:
        return from_matrix(leaf, total) if isinstance(leaf, FactoredLeaf) else total
    leaf_sigma = jnp.asarray(sigma, jnp.float32) * leaf.sigma_multiplier
    if isinstance(leaf, FactoredLeaf):
        total = from_matrix(leaf, total / math.sqrt(leaf.rank))
    if shared is not None:
        total *= shared.astype(jnp.float32)
    return total / (members * leaf_sigma)


def deviations(plan: Plan, coefficients: Array) -> Any:
    """Standard deviations of the sums of int8 parameters if the coefficients had nothing to do with the noise.

    Args:
        plan: the plan the population was perturbed by.
        coefficients: int8 or int32 [P].

    Returns:
        A pytree like the parameters of int32 scalars, in sixteenths: 16 sqrt(sum_p d_p^2) times that of one pair's noise.
    """
    root = integer.square_root(jnp.square(coefficients.astype(jnp.int32)).sum())
    of_one_pair = [round(256 * leaf.integer.deviation) if leaf.integer else 0 for leaf in plan.leaves]
    return jax.tree.unflatten(plan.tree, [integer.multiply_shifted(root, deviation, 8) for deviation in of_one_pair])


def paper_learning_rate(learning_rate: float, *, sigma: float, population_size: int) -> float:
    """Convert a step size of the EGGROLL paper's code to one for `optax.sgd` here.

    That code steps by lr sigma / sqrt(N) sum_i s_i f_i E_i, which is lr sigma^2 sqrt(N) times this library's gradient.

    Args:
        learning_rate: the paper's `lr_scale`, with z-scored fitness.
        sigma: standard deviation of the perturbation.
        population_size: N.

    Returns:
        learning_rate * sigma^2 * sqrt(population_size).
    """
    return learning_rate * sigma**2 * population_size**0.5
