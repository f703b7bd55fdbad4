"""The user's optimizer: what it is given, what is hidden from it, and how far its update splits."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from eggroll.noise.leaves import LeafPlan
from eggroll.noise.plan import Plan
from eggroll.noise.rules import Perturbation, is_integer, quantised_leaves, trainable
from eggroll.protocol import Strategy
from eggroll.state import ESState, Masters
from eggroll.update import estimator
from eggroll.update.precision import float32_params, init_masters
from eggroll.update.splitting import Reading


@functools.partial(jax.tree_util.register_dataclass, data_fields=["key", "generation"], meta_fields=["plan"])
@dataclasses.dataclass(frozen=True)
class NoiseSource:
    """Where an optimizer finds the noise of a generation: with its coefficients, the estimate can be had again at any time."""

    plan: Plan
    key: Array  # typed threefry key of the run
    generation: Array  # int32 [], of the noise

    def map_leaves(self, function: Callable[[LeafPlan, Array], Array], updates: Any) -> Any:
        """`function(leaf's plan, leaf)` for every leaf of the updates; those that optax has masked stay so."""
        leaves, tree = jax.tree.flatten(updates, is_leaf=is_masked)
        pairs = zip(self.plan.leaves, leaves, strict=True)
        return jax.tree.unflatten(tree, [leaf if is_masked(leaf) else function(own, leaf) for own, leaf in pairs])


def read_update(
    plan: Plan, optimizer: optax.GradientTransformation, state: ESState, coefficients: Any, *, sigma: Any, noise_generation: Any
) -> tuple[Reading, Any]:
    """Read how far the update of an optimizer can be split.

    Args:
        plan: the plan that the population was perturbed by.
        optimizer: any optax transformation; one with extra arguments gets `coefficients`, `sigma` and `noise`, a `NoiseSource`,
            too. For int8 parameters one to int8 steps, `threshold`: it gets sums over the pairs, with `deviation` and
            `generation`.
        state: of which shapes and dtypes count here.
        coefficients: [P] of the whole population.
        sigma: standard deviation that the population was perturbed with.
        noise_generation: generation // noise_reuse.

    Returns:
        `(reading, extra)`: with the extra arguments of the update.
    """
    if plan.is_integer:
        extra = {"deviation": estimator.deviations(plan, coefficients), "generation": state.generation}
    else:
        source = NoiseSource(plan, state.key, jnp.asarray(noise_generation, jnp.int32))
        extra = {"coefficients": coefficients, "sigma": sigma, "noise": source}
    wide = jax.eval_shape(
        lambda params, masters: float32_params(params, masters, quantised=plan.quantised), *state[:1], state.masters
    )
    sums = jnp.int32 if plan.is_integer else jnp.float32
    gradients = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, sums), wide)
    return Reading(optax.with_extra_args_support(optimizer), gradients, state.opt_state, wide, extra), extra


def describe_update(plan: Plan, optimizer: Any, params: Any, settings: Strategy[ESState], *, on_mesh: bool) -> Plan:
    """Return the plan with a line on how the optimizer lets its parameters be updated, for its table.

    Args:
        plan: of the parameters.
        optimizer: any optax transformation.
        params: of which shapes and dtypes count.
        settings: the strategy.
        on_mesh: whether it runs on a mesh.
    """
    found: list[Reading] = []

    def read(params: Any, key: Array, coefficients: Array) -> None:
        masters, opt_state = init_masters_and_optimizer(optimizer, params, settings.perturbation, settings.precision)
        state = ESState(params, opt_state, key, jnp.int32(0), jnp.float32(1), masters, None)
        given = coefficients.astype(jnp.int32) if plan.is_integer else coefficients
        masked = mask_frozen(optimizer, params, settings.perturbation)
        found.append(read_update(plan, masked, state, given, sigma=state.sigma, noise_generation=state.generation)[0])

    coefficients = jax.ShapeDtypeStruct((settings.population_size // 2,), jnp.float32)
    jax.eval_shape(read, params, jax.eval_shape(lambda: jax.random.key(0)), coefficients)
    split, reason = found[0].split, found[0].reason or "values of one are used for another"
    if split == "elements":
        line = "block by block"
    elif split == "leaves" and not on_mesh:
        line = f"one parameter at a time: the optimizer does not update each weight on its own ({reason})"
    else:
        line = f"all parameters at once, all gradients in memory: the optimizer does not update each on its own ({reason})"
    return dataclasses.replace(plan, update=line)


def mask_frozen(optimizer: Any, params: Any, perturbation: Perturbation) -> optax.GradientTransformation:
    """Hide the parameters that are frozen by rule from the user's optimizer, whose state stays its own."""
    mask = trainable(params, perturbation)
    if is_integer(perturbation) or all(jax.tree.leaves(mask)):
        return optimizer  # sums of frozen int8 parameters are zero
    inner = optax.with_extra_args_support(optimizer)

    def hide(tree: Any) -> Any:
        return tree if tree is None else jax.tree.map(lambda own, leaf: leaf if own else optax.MaskedNode(), mask, tree)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        moves, state = inner.update(hide(updates), state, hide(params), **extra)
        return jax.tree.map(lambda own, move, leaf: move if own else jnp.zeros_like(leaf), mask, moves, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: inner.init(hide(params)), update)


def init_masters_and_optimizer(optimizer: Any, params: Any, perturbation: Perturbation, precision: str) -> tuple[Masters, Any]:
    """Return the masters and the optimizer's state of a new run."""
    grid = quantised_leaves(params, perturbation)
    masters = init_masters(params, precision, quantised=grid)
    wide = float32_params(params, masters, quantised=grid)
    return masters, mask_frozen(optimizer, params, perturbation).init(wide)


def is_masked(leaf: Any) -> bool:
    """Whether optax stands in for a leaf that an optimizer does not see."""
    return isinstance(leaf, optax.MaskedNode)
