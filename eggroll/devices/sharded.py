"""Evaluation and gradient over a mesh of devices, with `jax.shard_map`.

    evaluate    every device runs `population.evaluate` on its own pairs (and its share of the batch)
    gradient    every device runs `estimator.gradient` on its own pairs; g = psum of the parts
    update      every device updates the pieces of the parameters that it holds (`pieces`)

Noise is drawn from its address on the device that needs it: only results per member and the gradient cross between devices. If
the devices do not divide the pairs, the last ones evaluate padding pairs; their results are cut off, their coefficients are 0.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import PartitionSpec

from eggroll.devices.mesh import Placement
from eggroll.devices.pieces import pad_coefficients, piece_specs, update_pieces
from eggroll.noise.leaves import FrozenLeaf, LeafPlan
from eggroll.noise.plan import Plan
from eggroll.population import evaluate as population
from eggroll.population.layout import PopulationLayout, Scalars
from eggroll.population.metrics import widen
from eggroll.state import ESState
from eggroll.update import estimator
from eggroll.update.feedback import Feedback
from eggroll.update.optimizer import read_update
from eggroll.update.parameters import update_state, update_state_at_once

OVER_SHARES: dict[str, Callable] = {  # how results of the shares of the batch are joined: the reductions of aux, and "own"
    "own": lambda x, axis: x,
    "sum": lambda x, axis: jax.lax.psum(widen(x), axis),
    "mean": lambda x, axis: jax.lax.pmean(widen(x), axis),
    "all": jax.lax.pmean,
    "max": jax.lax.pmax,
    "min": jax.lax.pmin,
}


def evaluate_fitness(
    function: Callable,
    plan: Plan,
    params: Any,
    scalars: Scalars,
    *,
    placement: Placement | None,
    layout: PopulationLayout,
    aux: Any,
    batch: Any = None,
    member_state: Any = None,
) -> Any:
    """Evaluate a function from `fitness.normalise_fitness`; the batch is split over "data".

    Args:
        function: returns (fitness, aux, member_state) of one member.
        plan: the plan of `params`.
        params: unperturbed parameters.
        scalars: key, generation and sigma of the noise, key of the evaluation.
        placement: the mesh; None: one device.
        layout: as for `evaluate`.
        aux: its reductions, names out of `metrics.REDUCTIONS`.
        batch: pytree.
        member_state: pytree with leading axes [P, 2], or None.

    Returns:
        The results with leading axes [P, 2]; the fitness, averaged over the shares of the batch, is known to every device.
    """
    fitness, values, member_state = evaluate(
        function,
        plan,
        params,
        scalars,
        placement=placement,
        layout=layout,
        batch=batch,
        member_state=member_state,
        over_data=("mean", aux, "own"),
    )
    if placement is not None:
        fitness = jax.lax.with_sharding_constraint(fitness, placement.replicated)
    return fitness, values, member_state


def evaluate(
    function: Callable,
    plan: Plan,
    params: Any,
    scalars: Scalars,
    *,
    placement: Placement | None,
    layout: PopulationLayout,
    batch: Any = None,
    member_state: Any = None,
    over_data: Any = None,
) -> Any:
    """`population.evaluate` over a mesh.

    Args:
        function: `function(params, batch, key, member_state) -> pytree`, one member.
        plan: the plan of `params`.
        params: unperturbed parameters.
        scalars: key, generation and sigma of the noise, key of the evaluation.
        placement: the mesh; None: one device.
        layout: the whole population; its chunks are those of one device.
        batch: pytree.
        member_state: pytree with leading axes [P, 2], or None.
        over_data: how the results of the shares of the batch are joined: a tree prefix of the results, with names from
            `OVER_SHARES`; None: every device along "data" takes all of the batch.

    Returns:
        The results with leading axes [P, 2], which lie over "population".
    """
    scalars = scalars._replace(sigma=None) if plan.is_integer else scalars

    def run(
        layout: PopulationLayout, params: Any, batch: Any, member_state: Any, scalars: Scalars, first_pair: Array | int
    ) -> Any:
        results = population.evaluate(
            function,
            plan,
            params,
            layout=layout,
            noise_key=scalars.noise_key,
            noise_generation=scalars.noise_generation,
            sigma=scalars.sigma,
            evaluation_key=scalars.evaluation_key,
            batch=batch,
            member_state=member_state,
            first_pair=first_pair,
        )
        return results if over_data is None or placement is None else _join_shares(placement, over_data, results)

    if placement is None or not placement.manual:
        return run(layout, params, batch, member_state, scalars, 0)
    local = dataclasses.replace(placement.local_layout, chunk_pairs=layout.chunk_pairs)
    devices = placement.size("population")
    padded = local.num_pairs * devices
    if layout.members_per_batch in (1, 2):
        batch = _repeat_last(batch, 2 * padded // layout.members_per_batch)
    member_state = _repeat_last(member_state, padded)

    def on_device(first_pair, params, batch, member_state, scalars):
        return run(local, params, batch, member_state, scalars, first_pair[0])

    members, everywhere = PartitionSpec(placement.axis("population")), PartitionSpec()
    in_specs = (members, everywhere, placement.batch_spec(split=over_data is not None, padded=True), members, everywhere)
    first_pairs = local.num_pairs * jnp.arange(devices, dtype=jnp.int32)
    results = _shard_map(placement, on_device, in_specs, members)(first_pairs, params, batch, member_state, scalars)
    return results if padded == layout.num_pairs else jax.tree.map(lambda x: x[: layout.num_pairs], results)


def evaluate_unperturbed(
    function: Callable, params: Any, batch: Any, key: Array, *, placement: Placement | None, over_data: Any
) -> Any:
    """`function(params, batch, key)` on the shares of the batch on which `evaluate` runs the members, joined as there."""
    if placement is None or placement.axis("data") is None:
        return function(params, batch, key)
    run, same = lambda *args: _join_shares(placement, over_data, function(*args)), PartitionSpec()
    in_specs = same, placement.batch_spec(split=True, padded=True), same
    return _shard_map(placement, run, in_specs, same)(params, batch, key)


def gradient(
    plan: Plan,
    coefficients: Array,
    *,
    placement: Placement | None,
    noise_key: Array,
    noise_generation: Array | int,
    sigma: Array | None,
) -> Any:
    """`estimator.gradient` over a mesh: the pairs are spread over "population" and "data".

    Args:
        plan: the plan the population was perturbed by.
        coefficients: float32 [P], or integers of int8 parameters.
        placement: the mesh; None: one device.
        noise_key: the run's key.
        noise_generation: generation // noise_reuse.
        sigma: standard deviation the population was perturbed with; not used for int8 parameters.

    Returns:
        float32 or int32 pytree like the parameters; with `shard_optimizer` its leaves lie over "population".
    """
    if placement is None or not placement.manual:
        return estimator.gradient(plan, coefficients, noise_key=noise_key, noise_generation=noise_generation, sigma=sigma)
    num_pairs, devices = coefficients.shape[0], math.prod(map(placement.size, placement.manual))
    each = -(-num_pairs // devices)
    specs = [_gradient_spec(placement, leaf) for leaf in plan.leaves]

    def on_device(first_pair, coefficients, noise_key, noise_generation, sigma):
        part = estimator.gradient(
            plan,
            coefficients,
            noise_key=noise_key,
            noise_generation=noise_generation,
            sigma=sigma,
            first_pair=first_pair[0],
            num_pairs=num_pairs,
        )
        parts = zip(plan.leaves, jax.tree.leaves(part), specs, strict=True)
        return [own if isinstance(leaf, FrozenLeaf) else _sum_over_devices(placement, own, spec) for leaf, own, spec in parts]

    spread = PartitionSpec(placement.manual)
    same = PartitionSpec()
    run = _shard_map(placement, on_device, (spread, spread, same, same, same), specs)
    first_pairs, padded = each * jnp.arange(devices, dtype=jnp.int32), pad_coefficients(coefficients, each * devices)
    return jax.tree.unflatten(plan.tree, run(first_pairs, padded, noise_key, noise_generation, sigma))


def update(
    plan: Plan,
    optimizer: optax.GradientTransformationExtraArgs,
    state: ESState,
    coefficients: Array,
    *,
    placement: Placement | None,
    shardings: ESState | None,
    value: Array | None,
    sigma: Array,
    noise_generation: Array,
    precision: str | Feedback,
) -> tuple[ESState, Any]:
    """Update the parameters; on a mesh every device updates the pieces that it holds.

    Args:
        plan: the plan the population was perturbed by.
        optimizer: from `fit_optimizer`.
        state: before the update.
        coefficients: float32 [P], or integers of int8 parameters.
        placement: the mesh; None: one device.
        shardings: of the state; None: where it lies is not known.
        value: minus the mean fitness of the population, or None.
        sigma: standard deviation the population was perturbed with.
        noise_generation: generation // noise_reuse.
        precision: how short floats and quantised parameters are updated.

    Returns:
        As for `parameters.update_state`.
    """
    scalars = {"value": value, "sigma": sigma, "noise_generation": noise_generation}
    reading, extra = read_update(plan, optimizer, state, coefficients, **scalars)
    if placement is None and reading.split != "whole":
        update = functools.partial(update_state, plan, reading, extra, state, coefficients)
        return update(sigma=sigma, noise_generation=noise_generation, precision=precision)
    specs = None if placement is None or shardings is None else piece_specs(placement, shardings)
    if placement is not None and specs is not None and reading.split == "elements":
        update = functools.partial(update_pieces, placement, specs, plan, reading, extra, state, coefficients)
        return update(sigma=sigma, noise_generation=noise_generation, precision=precision)
    if isinstance(precision, Feedback):
        raise ValueError("precision Feedback is not for parameters that lie over the mesh axes population or data.")
    of_noise = {"noise_key": state.key, "noise_generation": noise_generation, "sigma": sigma}
    sums = gradient(plan, coefficients, placement=placement, **of_noise)
    return update_state_at_once(plan, optimizer, extra, state, sums, precision=precision)


def _join_shares(placement: Placement, names: Any, results: Any) -> Any:
    """The results of this device, joined with those of the devices that have the other shares of the batch."""
    if placement.axis("data") is None:
        return results
    return jax.tree.map(lambda name, tree: jax.tree.map(lambda x: OVER_SHARES[name](x, "data"), tree), names, results)


def _gradient_spec(placement: Placement, leaf: LeafPlan) -> PartitionSpec:
    shared = placement.shard_optimizer and not isinstance(leaf, FrozenLeaf)
    return placement.share_spec(leaf.shape) if shared else PartitionSpec()


def _sum_over_devices(placement: Placement, part: Array, spec: PartitionSpec) -> Array:
    """The sum of the devices' parts, all of it or (psum_scatter) this device's share."""
    if "population" not in spec:
        return jax.lax.psum(part, placement.manual)
    part = jax.lax.psum_scatter(part, "population", scatter_dimension=spec.index("population"), tiled=True)
    return jax.lax.psum(part, "data") if placement.axis("data") else part


def _shard_map(placement: Placement, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    # check_vma would refuse the user's own scans, whose initial carry is the same on every device.
    shard = functools.partial(jax.shard_map, mesh=placement.mesh, axis_names=set(placement.manual), check_vma=False)
    return shard(function, in_specs=in_specs, out_specs=out_specs)


def _repeat_last(tree: Any, size: int) -> Any:
    """Lengthen the leading axis of every leaf to `size`."""

    def repeat(leaf: Array) -> Array:
        return leaf if leaf.shape[0] == size else leaf[jnp.minimum(jnp.arange(size), leaf.shape[0] - 1)]

    return jax.tree.map(repeat, tree)
