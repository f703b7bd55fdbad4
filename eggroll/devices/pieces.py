"""The update over a mesh, by the pieces of parameters that devices hold.

Every device updates its own piece of every parameter, block by block, with all moments and masters of that piece: what is
sharded over "model" by the user, or over "population" by `shard_optimizer`, and everything where nothing is sharded. Sums over
pairs are split over the axes that hold no pieces and joined by a psum of one block at a time. Noise and random bits are those
of the piece's place in the parameter. Nothing else crosses, except updated parameters under `shard_optimizer` (all-gather).
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from eggroll.devices.mesh import Placement
from eggroll.noise.plan import Plan
from eggroll.state import ESState
from eggroll.update.blocks import Counts, carry_over
from eggroll.update.feedback import Feedback
from eggroll.update.parameters import Part, update_state
from eggroll.update.splitting import Reading


def piece_specs(placement: Placement, shardings: ESState) -> list[PartitionSpec] | None:
    """Where the pieces of every parameter lie, or None where parameters lie over the axes that share the pairs.

    Args:
        placement: the mesh.
        shardings: of the state; `None` where the partitioner decides.
    """
    lying = jax.tree.leaves(shardings.params, is_leaf=lambda leaf: leaf is None)
    if any(sharding is None for sharding in lying):
        return None
    specs = [sharding.spec for sharding in lying]
    return None if {"population", "data"} & {name for spec in specs for names in spec for name in _names(names)} else specs


def update_pieces(
    placement: Placement,
    specs: list[PartitionSpec],
    plan: Plan,
    reading: Reading,
    extra: Any,
    state: ESState,
    coefficients: Array,
    *,
    sigma: Array,
    noise_generation: Array,
    precision: str | Feedback,
) -> tuple[ESState, Any]:
    """`parameters.update_state` over a mesh.

    Args:
        placement: the mesh.
        specs: from `piece_specs`.
        plan: the plan the population was perturbed by.
        reading: of the optimizer, whose update splits into elements.
        extra: the extra arguments of the optimizer.
        state: before the update.
        coefficients: float32 [P], or integers of int8 parameters.
        sigma: standard deviation the population was perturbed with.
        noise_generation: generation // noise_reuse.
        precision: how short floats and quantised parameters are updated.
    """
    mesh, shares = placement.mesh, placement.shard_optimizer
    everywhere: Any = PartitionSpec()
    pieces = [placement.share_spec(leaf.shape) for leaf in plan.leaves] if shares else specs
    pair_axes = tuple(name for name in placement.manual if not (shares and name == "population"))
    num_pairs, devices = coefficients.shape[0], math.prod(map(placement.size, pair_axes))
    each = -(-num_pairs // devices)

    def on_device(first_pair: Array, own: Array, state: ESState, extra: Any, sigma: Array, noise_generation: Array) -> Any:
        origins = [_origin(placement, spec, leaf.shape) for spec, leaf in zip(pieces, plan.leaves, strict=True)]
        part = Part(
            first_pair=first_pair[0],
            num_pairs=num_pairs,
            join=(lambda total: jax.lax.psum(total, pair_axes)) if pair_axes else Part.join,
            origins=tuple(origins),
            total=lambda leaf, counts: _total(pieces[leaf], counts),
        )
        if shares:
            state = state._replace(params=_map(functools.partial(_own_piece, placement), state.params, pieces, origins))
        update = functools.partial(update_state, plan, reading, extra, state, own, precision=precision, part=part)
        new, done = update(sigma=sigma, noise_generation=noise_generation)
        return (new._replace(params=_map(_gather, new.params, pieces)) if shares else new), done

    of_params = jax.tree.unflatten(jax.tree.structure(state.params), [everywhere] * len(pieces) if shares else pieces)
    of_moments = [[spec] * len(reading.states_of(index, jax.tree.leaves(state.opt_state))) for index, spec in enumerate(pieces)]
    of_shared = [everywhere] * len(reading.shared_states(jax.tree.leaves(state.opt_state)))
    of_masters: Any = tuple(None if master is None else spec for master, spec in zip(state.masters, pieces, strict=True))
    opt_state = reading.join_states(of_moments, of_shared)
    of_state: Any = ESState(of_params, opt_state, everywhere, everywhere, everywhere, of_masters, None)
    spread = PartitionSpec(pair_axes or None)
    run = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(spread, spread, of_state, everywhere, everywhere, everywhere),
        out_specs=(of_state, everywhere),
        check_vma=False,
    )
    first_pairs = each * jnp.arange(devices, dtype=jnp.int32)
    padded = pad_coefficients(coefficients, each * devices)
    new, done = run(first_pairs, padded, state._replace(member_state=None), extra, sigma, noise_generation)
    return new._replace(member_state=state.member_state), done


def pad_coefficients(coefficients: Array, size: int) -> Array:
    """[P] to [size]: padding pairs have zero weight."""
    return jnp.pad(coefficients, (0, size - coefficients.shape[0]))


def _names(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a spec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _entries(spec: PartitionSpec, ndim: int) -> list[tuple[str, ...]]:
    return [_names(entry) for entry in spec] + [()] * (ndim - len(spec))


def _origin(placement: Placement, spec: PartitionSpec, shape: tuple[int, ...]) -> tuple[Array | int, ...]:
    """Where this device's piece of an array begins."""

    def along(names: tuple[str, ...], size: int) -> Array | int:
        index: Array | int = 0
        for name in names:
            index = index * placement.size(name) + jax.lax.axis_index(name)
        return index * (size // math.prod(map(placement.size, names)))

    return tuple(along(names, size) for names, size in zip(_entries(spec, len(shape)), shape, strict=True))


def _map(function: Any, tree: Any, *of_leaves: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [function(*known) for known in zip(leaves, *of_leaves, strict=True)])


def _own_piece(placement: Placement, whole: Array, spec: PartitionSpec, origin: Any) -> Array:
    entries = _entries(spec, whole.ndim)
    sizes = [size // math.prod(map(placement.size, names)) for size, names in zip(whole.shape, entries, strict=True)]
    return jax.lax.dynamic_slice(whole, origin, sizes)


def _gather(piece: Array, spec: PartitionSpec) -> Array:
    for axis, names in enumerate(_entries(spec, piece.ndim)):
        if names:
            piece = jax.lax.all_gather(piece, names, axis=axis, tiled=True)
    return piece


def _total(spec: PartitionSpec, counts: Counts) -> Counts:
    """The counts of a parameter, from those of its pieces."""
    names = tuple(name for entry in spec for name in _names(entry))
    if not names:
        return counts
    whole = jax.tree.map(functools.partial(jax.lax.psum, axis_name=names), counts)
    return whole._replace(moved=carry_over(whole.moved))
