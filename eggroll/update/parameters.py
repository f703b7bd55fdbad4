"""The end of a generation: pair coefficients to new parameters.

The coefficients and sigma are all that a generation adds to a run, so a record of them rebuilds it (see `journal`). They are
NaN where nothing is to change; a gradient that is not finite changes nothing either.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from eggroll.noise import addresses
from eggroll.noise.leaves import LeafPlan
from eggroll.noise.plan import Plan
from eggroll.noise.rules import Perturbation, is_integer, quantised_leaves, trainable
from eggroll.state import ESState, Masters
from eggroll.update import estimator
from eggroll.update.precision import apply_updates, float32_params, init_masters


class UpdateReport(NamedTuple):
    """What an update did."""

    skipped: Array  # bool [], nothing changed: the gradient was not finite
    gradient_norm: Array  # float32 []
    leaf_norms: Array  # float32 [leaves], gradient norm of every leaf in the order of the plan
    moved: Array  # float32 [], share of the stored weights that changed their value


@functools.partial(jax.tree_util.register_dataclass, data_fields=["key", "generation"], meta_fields=["plan"])
@dataclasses.dataclass(frozen=True)
class NoiseSource:
    """Where an optimizer finds the noise of a generation: with its coefficients, the estimate can be had again at any time."""

    plan: Plan
    key: Array  # typed threefry key of the run
    generation: Array  # int32 [], of the noise

    def map_leaves(self, function: Callable[[LeafPlan, Array], Array], updates: Any) -> Any:
        """`function(leaf's plan, leaf)` for every leaf of the updates; those that optax has masked stay so."""
        leaves, tree = jax.tree.flatten(updates, is_leaf=_is_masked)
        pairs = zip(self.plan.leaves, leaves, strict=True)
        return jax.tree.unflatten(tree, [leaf if _is_masked(leaf) else function(own, leaf) for own, leaf in pairs])


def apply_gradient(
    plan: Plan,
    optimizer: optax.GradientTransformation,
    state: ESState,
    ascent: Any,
    *,
    coefficients: Array,
    sigma: Array,
    noise_generation: Array,
    precision: str,
) -> tuple[ESState, Any]:
    """Update the parameters.

    Args:
        plan: the plan that the population was perturbed by.
        optimizer: any optax transformation; one with extra arguments gets `coefficients`, `sigma` and `noise`, a `NoiseSource`,
            too. For int8 parameters one to int8 steps, `threshold`: it gets sums over the pairs, with `deviation` and
            `generation`.
        state: before the update.
        ascent: the gradient estimate of `coefficients`, float32; for int8 parameters the sums over pairs, int32.
        coefficients: float32 [P], from `estimator.pair_coefficients`; for int8 parameters from `round_coefficients`.
        sigma: standard deviation that the population was perturbed with.
        noise_generation: generation // noise_reuse.
        precision: how short floats and quantised parameters are updated.

    Returns:
        The state with new params, opt_state and masters, and what `make_report` makes a report of.
    """
    optimizer = optax.with_extra_args_support(optimizer)
    descent = jax.tree.map(jnp.negative, ascent)  # optax minimises: the only negation
    if plan.is_integer:
        return _apply_integers(plan, optimizer, state, descent, coefficients)
    wide = float32_params(state.params, state.masters, quantised=plan.quantised)
    source = NoiseSource(plan, state.key, jnp.asarray(noise_generation, jnp.int32))
    updates, opt_state = optimizer.update(descent, state.opt_state, wide, coefficients=coefficients, sigma=sigma, noise=source)
    params, masters = apply_updates(
        state.params,
        state.masters,
        updates,
        precision=precision,
        key=jax.random.fold_in(addresses.stream_key(state.key, 2), state.generation),
        quantised=plan.quantised,
    )
    squares = jnp.stack([jnp.sum(leaf**2) for leaf in jax.tree.leaves(ascent)])
    skipped = ~jnp.isfinite(squares.sum())
    changed = state._replace(params=params, opt_state=opt_state, masters=masters)
    kept = jax.tree.map(lambda new, old: jnp.where(skipped, old, new), changed, state)
    moved = _share_moved(plan, state.params, kept.params)
    return kept, UpdateReport(skipped, jnp.sqrt(squares.sum()), jnp.sqrt(squares), moved)


def _apply_integers(plan: Plan, optimizer: Any, state: ESState, descent: Any, coefficients: Array) -> tuple[ESState, Array]:
    """`apply_gradient` of int8 parameters, in integers throughout. The weights of every leaf that moved: int32 [leaves]."""
    deviation = estimator.deviations(plan, coefficients)
    steps, opt_state = optimizer.update(
        descent, state.opt_state, state.params, deviation=deviation, generation=state.generation
    )
    params, counts = [], []
    for leaf, param, step in zip(plan.leaves, jax.tree.leaves(state.params), jax.tree.leaves(steps), strict=True):
        if leaf.integer and step.dtype != jnp.int8:
            raise TypeError(f"optimizer must be eggroll.threshold(...) for int8 parameters, got steps of dtype {step.dtype}.")
        params.append(param + step if leaf.integer else param)
        counts.append(jnp.sum(step != 0, dtype=jnp.int32) if leaf.integer else jnp.int32(0))
    return state._replace(params=jax.tree.unflatten(plan.tree, params), opt_state=opt_state), jnp.stack(counts)


def round_coefficients(plan: Plan, coefficients: Array, shaping: Any) -> Array:
    """Round the coefficients to whole numbers, 0 for NaN, where the parameters are int8."""
    if not plan.is_integer:
        return coefficients
    return jnp.nan_to_num(coefficients).astype(jnp.int8 if shaping == "pair_sign" else jnp.int32)


def make_report(plan: Plan, done: Any) -> UpdateReport:
    """Make the report of an update. Norms of int8 parameters are those of the steps: square roots of how many moved."""
    if not plan.is_integer:
        return done
    counts = done.astype(jnp.float32)
    size = sum(math.prod(leaf.shape) for leaf in plan.leaves if leaf.integer)
    return UpdateReport(jnp.bool_(False), jnp.sqrt(counts.sum()), jnp.sqrt(counts), counts.sum() / size)


def mask_frozen(optimizer: Any, params: Any, perturbation: Perturbation) -> optax.GradientTransformation:
    """Restrict the user's optimizer to the parameters that are not frozen by rule (sums of int8 ones are zero there)."""
    mask = trainable(params, perturbation)
    if is_integer(perturbation) or all(jax.tree.leaves(mask)):
        return optimizer
    labels = jax.tree.map(lambda trained: "trained" if trained else "frozen", mask)
    return optax.multi_transform({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)


def init_masters_and_optimizer(optimizer: Any, params: Any, perturbation: Perturbation, precision: str) -> tuple[Masters, Any]:
    """Return the masters and the optimizer's state of a new run."""
    grid = quantised_leaves(params, perturbation)
    masters = init_masters(params, precision, quantised=grid)
    wide = float32_params(params, masters, quantised=grid)
    return masters, mask_frozen(optimizer, params, perturbation).init(wide)


def _share_moved(plan: Plan, old: Any, new: Any) -> Array:
    leaves = zip(plan.quantised, jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
    pairs = [(a, b) for on_grid, a, b in leaves if on_grid or _is_float(a)]
    moved = sum((jnp.sum(a != b, dtype=jnp.float32) for a, b in pairs), start=jnp.float32(0))
    return moved / max(1, sum(a.size for a, _ in pairs))


def _is_masked(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)


def _is_float(leaf: Array) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.floating))
