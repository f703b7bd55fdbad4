"""The end of a generation: pair coefficients to new parameters.

The coefficients and sigma are all that a generation adds to a run, so a record of them rebuilds it (see `journal`). They are
NaN where nothing is to change. What is stored is finite: see `blocks`.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from eggroll.noise import addresses
from eggroll.noise.draws import LeafKeys, leaf_keys
from eggroll.noise.leaves import LeafPlan
from eggroll.noise.once import rounded_once
from eggroll.noise.plan import Plan
from eggroll.noise.regions import Region, block_limit, cut
from eggroll.noise.rules import Frozen
from eggroll.state import ESState
from eggroll.update import estimator
from eggroll.update.blocks import Counts, Held, Moves, Storing, move, no_counts, sum_held
from eggroll.update.checksums import sum_array
from eggroll.update.feedback import Feedback, Window, is_fed_back
from eggroll.update.optimizer import places_of_moments
from eggroll.update.pair_sums import draw_together
from eggroll.update.precision import are_short, float32_params, rounding_words
from eggroll.update.report import summarise
from eggroll.update.split_update import SplitUpdate
from eggroll.update.splitting import Reading


@dataclasses.dataclass(frozen=True)
class Part:
    """What one device computes of an update; by default, all of it."""

    first_pair: Array | int = 0  # of the coefficients that it sums over
    num_pairs: int | None = None  # of the whole population; None: the coefficients are of all pairs
    join: Callable[[Array], Array] = lambda total: total  # sums what the devices summed over their own pairs
    origins: tuple[tuple[Array | int, ...], ...] | None = None  # where its piece of every parameter begins; None: at zero
    total: Callable[[int, Counts], Counts] = lambda leaf, counts: counts  # joins the counts of the pieces of a parameter

    def own(self, coefficients: Array, count: int) -> Array:
        """The coefficients of its `count` pairs out of those of the whole population; padding pairs have zero weight."""
        if self.num_pairs is None:
            return coefficients
        return jax.lax.dynamic_slice(jnp.pad(coefficients, (0, count)), (self.first_pair,), (count,))


ALL = Part()


def update_state(
    plan: Plan,
    reading: Reading,
    extra: Any,
    state: ESState,
    coefficients: Array,
    *,
    sigma: Array,
    noise_generation: Array,
    precision: str | Feedback,
    part: Part = ALL,
) -> tuple[ESState, Any]:
    """Update the parameters one after the other, those whose optimizer allows it block by block.

    Args:
        plan: the plan that the population was perturbed by.
        reading: of the optimizer, not "whole".
        extra: the extra arguments of the optimizer.
        state: before the update; of parameters that are spread over devices, this device's pieces.
        coefficients: float32 [P], from `estimator.pair_coefficients`, or those of this device's pairs; for int8 parameters from
            `round_coefficients`.
        sigma: standard deviation that the population was perturbed with.
        noise_generation: generation // noise_reuse.
        precision: how short floats and quantised parameters are updated.
        part: of the update, that this device computes.

    Returns:
        The state with new params, opt_state and masters; what `make_report` makes a report of.
    """
    flat_states = jax.tree.leaves(state.opt_state)
    update = SplitUpdate(reading, flat_states, extra)

    def gradient(index: int, place: Region, own: Array, generation: Array, sigma: Array, key: LeafKeys, noise: Any) -> Array:
        return estimator.region_gradient(
            plan.leaves[index],
            place,
            own,
            key=key,
            noise_key=state.key,
            noise_generation=generation,
            sigma=sigma,
            first_pair=part.first_pair,
            num_pairs=part.num_pairs,
            drawn=noise,
            join=part.join,
        )

    def compute(index: int, region: Region, old: Held) -> Moves:
        place = _shifted(region, rules[index].origin)
        ascent = gradient(index, place, coefficients, noise_generation, sigma, keys[index], drawn.get(index))
        return Moves(ascent, *update.of_leaf(index, place, -ascent, old.param, old.moments))  # optax minimises: a negation here

    def feed_back(index: int, region: Region, old: Held) -> Moves:
        leaf, place = plan.leaves[index], _shifted(region, rules[index].origin)

        def compute_step(of_all: Array, generation: Array, sigma: Array) -> tuple[Array, Array]:
            own, (key,) = part.own(of_all, coefficients.shape[0]), leaf_keys([leaf], state.key, generation)
            ascent = gradient(index, place, own, generation, sigma, key, None)
            return ascent, update.of_leaf(index, place, -ascent, old.param, ())[0]

        words = rounding_words(_rounding_key(state.key, window.begun, index), leaf.shape, place.starts, place.sizes)
        return window.step(compute_step, words)

    keys = leaf_keys(plan.leaves, state.key, noise_generation)
    drawn = draw_together(plan.leaves, keys, coefficients.shape[0], part.first_pair)
    rules = _rules(plan, state, extra, precision, part.origins)
    window: Any = Window.of_update(state.opt_state, extra) if isinstance(precision, Feedback) else None
    held = _hold(state, [reading.states_of(index, flat_states) for index in range(len(plan.leaves))])
    moved, counts = [], []
    for index, (leaf, old) in enumerate(zip(plan.leaves, held, strict=True)):
        if _stays(leaf, old):
            new, count = old, no_counts(leaf, sum_held(old, rules[index]))
        else:
            limit = block_limit(coefficients.shape[0]) if reading.elementwise[index] else old.param.size
            cuts = cut(leaf, old.param.shape, limit=limit)
            step = feed_back if is_fed_back(leaf, precision) else compute
            new, count = move(old, cuts, functools.partial(step, index), rules[index])
        moved.append(new)
        counts.append(part.total(index, count))
    shared = _keep_finite(update.shared_states(), reading.shared_states(flat_states), rules[0].skipped)
    opt_state = reading.join_states([new.moments for new in moved], shared)
    checksums = _join_checksums(
        state, counts, zip(reading.shared_states(flat_states), shared, strict=True), reading.join_states
    )
    return _release(state, moved, opt_state), summarise(plan, counts, checksums, rules[0].skipped, extra.get("sigma"))


def update_state_at_once(
    plan: Plan,
    optimizer: optax.GradientTransformationExtraArgs,
    extra: Any,
    state: ESState,
    ascent: Any,
    *,
    precision: str | Feedback,
) -> tuple[ESState, Any]:
    """`update_state` with an optimizer that mixes parameters, or of parameters that lie where the partitioner wants.

    Args:
        plan: the plan that the population was perturbed by.
        optimizer: from `fit_optimizer`.
        extra: its extra arguments.
        state: before the update.
        ascent: the gradient estimate, float32; for int8 parameters the sums over pairs, int32.
        precision: how short floats and quantised parameters are updated.
    """
    wide = float32_params(state.params, state.masters, quantised=plan.quantised)
    descent = jax.tree.map(jnp.negative, ascent)  # optax minimises: the only negation
    updates, opt_state = optimizer.update(descent, state.opt_state, wide, **extra)
    rules = _rules(plan, state, extra, precision, None)
    places, shared = places_of_moments(state.opt_state, state.params)
    states, new_states = jax.tree.leaves(state.opt_state), jax.tree.leaves(opt_state)
    moved, counts = [], []
    moments, new_moments = ([[flat[k] for k in own] for own in places] for flat in (states, new_states))
    steps = map(Moves, jax.tree.leaves(ascent), jax.tree.leaves(updates), new_moments)
    for old, step, rule in zip(_hold(state, moments), steps, rules, strict=True):
        if _stays(rule.leaf, old):
            new, count = old, no_counts(rule.leaf, sum_held(old, rule))
        else:
            whole = cut(rule.leaf, old.param.shape, limit=old.param.size)
            new, count = move(old, whole, functools.partial(_give, step), rule)
        moved.append(new)
        counts.append(count)
    kept = _keep_finite([new_states[k] for k in shared], [states[k] for k in shared], rules[0].skipped)
    tree = jax.tree.structure(state.opt_state)

    def join(of_leaves: Sequence[Sequence[Array]], of_shared: Sequence[Array]) -> Any:
        entries: list[Any] = [None] * len(states)
        for own, values in zip((*places, shared), (*of_leaves, of_shared), strict=True):
            for place, value in zip(own, values, strict=True):
                entries[place] = value
        return jax.tree.unflatten(tree, entries)

    checksums = _join_checksums(state, counts, zip([states[k] for k in shared], kept, strict=True), join)
    opt_state = join([held.moments for held in moved], kept)
    return _release(state, moved, opt_state), summarise(plan, counts, checksums, rules[0].skipped, extra.get("sigma"))


def _stays(leaf: LeafPlan, held: Held) -> bool:
    """Whether nothing of a parameter changes: it is frozen, and the optimizer keeps nothing of it."""
    return isinstance(leaf.spec, Frozen) and not held.moments


def _give(moves: Moves, region: Region, old: Held) -> Moves:
    return moves


def is_skipped(coefficients: Array, sigma: Array) -> Array:
    """Whether a generation changes nothing, decided from its scalars: the squares of (f+ - f-) / (2 sigma) are not finite."""
    return ~jnp.isfinite(jnp.square(coefficients / (2 * sigma)).sum())


def _rules(plan: Plan, state: ESState, extra: Any, precision: str | Feedback, origins: Any) -> list[Storing]:
    """How the new values of every parameter are stored, and whether the generation is skipped: decided from its scalars."""
    skipped = None
    if not plan.is_integer:
        skipped = is_skipped(extra["coefficients"], extra["sigma"]) | (state.generation == jnp.iinfo(jnp.int32).max)
    short = are_short(jax.tree.leaves(state.params), plan.quantised)
    draws = precision == "stochastic" or isinstance(precision, Feedback)
    rounds = [draws and own and not is_fed_back(leaf, precision) for leaf, own in zip(plan.leaves, short, strict=True)]
    return [
        Storing(
            leaf,
            is_short,
            _rounding_key(state.key, state.generation, index) if rounds[index] else None,
            skipped,
            origins[index] if origins else (0,) * len(leaf.shape),
        )
        for index, (leaf, is_short) in enumerate(zip(plan.leaves, short, strict=True))
    ]


def _rounding_key(key: Array, number: Array, index: int) -> Array:
    """The key of the random bits of a parameter in a generation or, of one that is fed back, in a window."""
    return jax.random.fold_in(jax.random.fold_in(addresses.stream_key(key, 2), number), index)


def _hold(state: ESState, moments: Sequence[Sequence[Array]]) -> list[Held]:
    leaves = zip(jax.tree.leaves(state.params), state.masters, moments, strict=True)
    return [Held(param, master, tuple(own)) for param, master, own in leaves]


def _release(state: ESState, held: Sequence[Held], opt_state: Any) -> ESState:
    params = jax.tree.unflatten(jax.tree.structure(state.params), [own.param for own in held])
    return state._replace(params=params, opt_state=opt_state, masters=tuple(own.master for own in held))


def _join_checksums(
    state: ESState, counts: Sequence[Counts], shared: Iterable[tuple[Array, Array]], join: Callable[..., Any]
) -> Array:
    """The checksums before and after, uint32 [2, arrays], in the order of `checksums.checksum_names`.

    Args:
        state: before the update.
        counts: of every parameter.
        shared: arrays of the optimizer that belong to no parameter, before and after.
        join: makes the optimizer's state of its entries by parameter, and the shared ones.
    """
    others = [jnp.stack([*map(sum_array, pair)])[:, None] for pair in (*shared, (state.key, state.key))]
    found = [*(count.checksums for count in counts), *others]
    places = iter(range(sum(sums.shape[1] for sums in found)))
    columns = [[next(places) for _ in range(count.checksums.shape[1])] for count in counts]
    params = [own.pop(0) for own in columns]
    masters = [own.pop(0) for own, master in zip(columns, state.masters, strict=True) if master is not None]
    *of_shared, key = places
    order = [*params, *jax.tree.leaves(join(columns, of_shared)), *masters, key]
    return jnp.concatenate(found, axis=1)[:, np.array(order)]


def _shifted(region: Region, origin: Sequence[Array | int]) -> Region:
    return Region(tuple(start + first for start, first in zip(region.starts, origin, strict=True)), region.sizes)


def _keep_finite(new: Sequence[Array], old: Sequence[Array], skipped: Array | None) -> list[Array]:
    """New arrays of the optimizer's state that belong to no parameter; the old ones where they are not finite, or skipped."""

    def choose(new: Array, old: Array) -> Array:
        new = rounded_once(new)  # it is summed and stored
        stays = jnp.bool_(False) if skipped is None else skipped
        if jnp.issubdtype(old.dtype, jnp.floating):
            stays |= ~jnp.isfinite(new).all()
        return jnp.where(stays, old, new)

    return [choose(*pair) for pair in zip(new, old, strict=True)]
