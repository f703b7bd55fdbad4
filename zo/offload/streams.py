"""The programs of an offloaded step: perturbed streams through one block, and the update that was deferred to it.

Everything here is traced, and is what one device of the mesh does; `offload` runs it, block after block.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from eggroll.lazy.interpret import apply_perturbed
from eggroll.noise import addresses
from eggroll.noise.draws import draw_pair, draw_shared
from eggroll.noise.plan import LeafPlan, Plan
from eggroll.noise.rules import Frozen
from eggroll.population.members import member_params
from eggroll.update.estimator import leaf_gradient
from eggroll.update.precision import is_low, stochastic_round
from eggroll.zo.blocks import Blocks
from eggroll.zo.estimators import Estimator, coefficients
from eggroll.zo.offload.devices import Devices, Sliced, is_sliced, mine, own
from eggroll.zo.optimizers.descent import Descent, ProjectedMoment, next_moment
from eggroll.zo.optimizers.rebuilt_adam import History


class Pending(NamedTuple):
    """An update that the parameters do not have yet."""

    coefficients: Array  # float32 [n], -d
    generation: Array  # int32 [], of its noise
    sigma: Array  # float32 [], that its noise was scaled with
    rate: Array  # float32 [], its own learning rate; 0: nothing is pending
    scale: Array  # float32 [], of the second moment
    history: History | None = None  # of `Descent(adam=...)`: the steps that were not skipped


class OffloadState(NamedTuple):
    """State of an offloaded run: a pytree."""

    resident: Any  # on every device
    blocks: tuple[Any, ...]  # a pytree of `Sliced` for each of L blocks, in the host's memory
    pending: Pending
    moment: ProjectedMoment
    key: Array  # typed threefry key of the run
    generation: Array  # int32 []
    sigma: Array  # float32 []


class OffloadMetrics(NamedTuple):
    """What a step reports."""

    generation: Array  # int32 []
    loss: Array  # float32 [], unperturbed where the estimator evaluates it, else the mean over the perturbed forwards
    losses: Array  # float32 [n, 2]
    coefficients: Array  # float32 [n], -d; -coefficients / (2 sigma) are projected gradients
    skipped: Array  # bool [], no loss was finite: the step changes nothing


@dataclasses.dataclass(frozen=True)
class Streams:
    """What the programs need to know.

    Args:
        pieces: the model.
        estimator: which streams there are, and what becomes of their losses.
        descent: the update.
        directions: n.
        chunk_directions: directions that pass a block at a time; None: all.
        resident_plan: noise of the resident parameters.
        block_plan: noise of one block.
        devices: what they share.
    """

    pieces: Blocks
    estimator: Estimator
    descent: Descent
    directions: int
    chunk_directions: int | None
    resident_plan: Plan
    block_plan: Plan
    devices: Devices

    def begin(self, state: OffloadState, batch: Any) -> Any:
        """The resident parameters with what is pending, where every stream starts, and aux."""
        resident = self.moved_resident(state)
        key = jax.random.fold_in(addresses.stream_key(state.key, 1), state.generation)

        def begin(params: Any, entry: Any) -> Any:
            if self.estimator.per_example:
                return *self.pieces.begin(params, entry, key), entry
            return self.pieces.begin(params, batch, key)[0]

        base_x, aux = ((), ()) if self.estimator.per_example else self.pieces.begin(resident, batch, key)
        entries = self._entries(batch) if self.estimator.per_example else jnp.zeros(self._own_streams()[1].shape)
        return resident, own((self._streams(begin, self.resident_plan, resident, entries, state), base_x)), own(aux)

    def _entries(self, batch: Any) -> Any:
        """The example of every stream of this device, [a, b, 1, ...]."""
        pairs, signs = self._own_streams()
        chosen = jnp.minimum(pairs, self.directions - 1)
        return jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf[chosen][:, None, None], (*signs.shape, 1, *leaf.shape[1:])), batch
        )

    def _own_streams(self) -> tuple[Array, Array]:
        return self.devices.streams(self.directions, self.estimator.signs)

    def visit(self, state: OffloadState, block: Any, index: Array, carry: Any, aux: Any) -> Any:
        """A block with what is pending, and all streams behind it."""
        (x, base_x), aux = mine(carry), mine(aux)
        moved = self.moved_block(state, block, index)
        params = self.devices.whole(moved)
        x = self._streams(functools.partial(self._through, aux=aux), self.block_plan, params, x, state, index)
        return moved, own((x, self.pieces.block(params, base_x, aux) if self.estimator.unperturbed else base_x))

    def _through(self, params: Any, carried: Any, *, aux: Any) -> Any:
        """One stream behind a block; where every direction has an example of its own, it carries that and its aux along."""
        if not self.estimator.per_example:
            return self.pieces.block(params, carried, aux)
        x, aux, entry = carried
        return self.pieces.block(params, x, aux), aux, entry

    def end(self, state: OffloadState, resident: Any, carry: Any, batch: Any) -> tuple[OffloadState, OffloadMetrics]:
        """Losses, coefficients, and the next state but for its blocks."""
        estimator, (x, base_x) = self.estimator, mine(carry)

        def end(params: Any, carried: Any) -> tuple[Array, Array]:
            x, entry = (carried[0], carried[2]) if estimator.per_example else (carried, batch)
            return _total(self.pieces.end(params, x, entry))

        parts = self._streams(end, self.resident_plan, resident, x, state)
        losses = self.devices.losses(parts, self.directions, len(estimator.signs))
        base = self.devices.ratio(end(resident, base_x)) if estimator.unperturbed else jnp.float32(jnp.nan)
        other = losses[:, 1] if len(estimator.signs) == 2 else jnp.broadcast_to(base, losses.shape[:1])
        found = -coefficients(estimator, losses[:, 0], other, base, sigma=state.sigma)
        both = jnp.stack([losses[:, 0], other], axis=1)
        finite = jnp.isfinite(both)
        mean = jnp.where(finite, both, 0.0).sum() / finite.sum().astype(jnp.float32)  # NaN where none is
        # Where the resident step asks for a finite gradient norm, which offloading never has, this asks for finite squares.
        skipped = ~jnp.isfinite(jnp.square(found / (2 * state.sigma)).sum())
        loss = base if estimator.unperturbed else mean
        metrics = OffloadMetrics(state.generation, loss, both, found, skipped)
        return self._deferred(state._replace(resident=resident), found, skipped), metrics

    def _streams(
        self, function: Callable, plan: Plan, params: Any, carried: Any, state: OffloadState, index: Array | int = 0
    ) -> Any:
        """`function(member's params, what it carries)` for every direction and sign of this device: [a, b, ...]."""
        shared = draw_shared(plan, state.key, state.generation, first_index=index)

        def of_pair(inputs: Any) -> Any:
            pair, signs, carried = inputs
            drawn = draw_pair(plan, state.key, state.generation, pair, first_index=index, shared=shared)

            def of_sign(sign: Array, carried: Any) -> Any:
                member = member_params(plan, params, drawn, sign=sign, sigma=state.sigma, in_loop=True)
                return apply_perturbed(function, member, carried)

            return jax.vmap(of_sign)(signs, carried)

        pairs, signs = self._own_streams()
        chunk = self.chunk_directions
        if chunk is None or chunk >= pairs.shape[0]:
            return jax.vmap(of_pair)((pairs, signs, carried))
        return jax.lax.map(of_pair, (pairs, signs, carried), batch_size=chunk)

    def _deferred(self, state: OffloadState, found: Array, skipped: Array) -> OffloadState:
        """The state of the next step, to which the update of this one is pending; a skipped one counts for no schedule."""
        descent, safe = self.descent, jnp.where(skipped, 0.0, found)
        moment, scale = next_moment(state.moment, safe, state.sigma, descent.second_moment or 0.0)
        scale = jnp.float32(1) if descent.second_moment is None else scale
        rate = jnp.where(skipped, 0.0, descent.rate(state.moment.steps))
        moment = jax.tree.map(lambda new, old: jnp.where(skipped, old, new), moment, state.moment)
        history = state.pending.history
        if history is not None:
            after = history.after(safe, state.generation, state.sigma)
            history = jax.tree.map(lambda new, old: jnp.where(skipped, old, new), after, history)
        pending = Pending(safe, state.generation, state.sigma, rate, scale, history)
        return state._replace(pending=pending, moment=moment, generation=state.generation + 1)

    def moved_resident(self, state: OffloadState) -> Any:
        """The resident parameters with what is pending."""

        def moved(leaf: Array, planned: LeafPlan, ascent: Array, key: Array) -> Array:
            new = self._moved(leaf, planned, ascent, state.pending)
            return stochastic_round(new, leaf.dtype, uniform=jax.random.uniform(key, leaf.shape)) if is_low(leaf) else new

        return self._each_leaf(moved, leaf_gradient, self.resident_plan, state.resident, state, 0)

    def moved_block(self, state: OffloadState, block: Any, index: Array) -> Any:
        """This device's slices of a block with what is pending."""

        def moved(leaf: Sliced, planned: LeafPlan, ascent: Array, key: Array) -> Sliced:
            new = self._moved(leaf.values, planned, ascent, state.pending)
            if is_low(leaf.values):
                uniform = self.devices.slice_of_uniform(key, new.size)
                new = stochastic_round(new, leaf.values.dtype, uniform=uniform)
            return dataclasses.replace(leaf, values=new)

        return self._each_leaf(moved, self.devices.slice_of_gradient, self.block_plan, block, state, index)

    def _each_leaf(
        self, moved: Callable, estimate: Callable, plan: Plan, tree: Any, state: OffloadState, index: Array | int
    ) -> Any:
        """`moved(leaf, planned, its ascent, key for rounding)` for every leaf that is not frozen."""
        pending, adam = state.pending, self.descent.adam
        rounding = jax.random.fold_in(addresses.stream_key(state.key, 2), pending.generation)
        rounding = jax.random.fold_in(rounding, index)

        def of_leaf(leaf: Any, planned: LeafPlan) -> Any:
            if isinstance(planned.spec, Frozen):
                return leaf
            key = jax.random.fold_in(rounding, zlib.crc32(planned.path.encode()))
            own = functools.partial(estimate, planned, noise_key=state.key, first_index=index)
            if adam is None or pending.history is None:
                ascent = own(pending.coefficients, noise_generation=pending.generation, sigma=pending.sigma)
            else:
                ascent = adam.ascent(pending.history, own)
            return moved(leaf, planned, ascent, key)

        leaves = zip(jax.tree.leaves(tree, is_leaf=is_sliced), plan.leaves, strict=True)
        return jax.tree.unflatten(plan.tree, [of_leaf(*leaf) for leaf in leaves])

    def _moved(self, values: Array, planned: LeafPlan, ascent: Array, pending: Pending) -> Array:
        """Float32 values with what is pending."""
        wide = values.astype(jnp.float32)
        decay = self.descent.weight_decay if self.descent.decays_at(planned.path) else 0.0
        return wide + pending.rate * (ascent / pending.scale - decay * wide)

    def forward(self, block: Any, x: Any, aux: Any) -> Any:
        """One block, unperturbed."""
        return own(self.pieces.block(self.devices.whole(block), mine(x), mine(aux)))

    def first(self, resident: Any, batch: Any, key: Array) -> Any:
        """Where an unperturbed stream starts, and aux."""
        return own(self.pieces.begin(resident, batch, key))

    def loss(self, resident: Any, x: Any, batch: Any) -> Array:
        """The loss at the end of an unperturbed stream."""
        return self.devices.ratio(_total(self.pieces.end(resident, mine(x), batch)))


def _total(result: Any) -> tuple[Array, Array]:
    """A loss, or (total, weight), as float32 totals."""
    total, weight = result if isinstance(result, tuple) else (result, 1.0)
    return jnp.asarray(total, jnp.float32), jnp.asarray(weight, jnp.float32)
