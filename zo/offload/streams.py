"""The programs of an offloaded step: the deferred update of one block, and the perturbed streams through it.

    update_resident, update_block     parameters + pending update -> parameters, and their checksums before and after
    begin, visit, end                 perturbed streams -> losses -> coefficients
    defer                             coefficients -> pending update

Updates and `defer` are programs of their own, shared by step, flush and replay: these give the same bits. Everything here is
traced and runs on every device of the mesh; `runner` calls it block after block.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from eggroll.lazy.interpret import apply_perturbed
from eggroll.noise import addresses
from eggroll.noise.draws import draw_pair, draw_shared
from eggroll.noise.plan import Plan
from eggroll.population.members import member_params
from eggroll.population.metrics import FitnessReport
from eggroll.update.parameters import is_skipped
from eggroll.zo.blocks import Blocks, total_and_weight
from eggroll.zo.estimators import Estimator, report_losses
from eggroll.zo.offload import checksums
from eggroll.zo.offload.devices import Devices, add_device_axes, drop_device_axes
from eggroll.zo.offload.state import OffloadState, Pending
from eggroll.zo.offload.updates import update_block, update_resident
from eggroll.zo.optimizers.descent import Descent, next_moment


@dataclasses.dataclass(frozen=True)
class Streams:
    """Static configuration of the compiled programs.

    Args:
        pieces: the model.
        estimator: decides the streams, and turns their losses into coefficients.
        descent: the update.
        directions: n.
        chunk_directions: directions evaluated at a time; None: all.
        resident_plan: noise of the resident parameters.
        block_plan: noise of one block.
        devices: the mesh.
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
        """The start of every stream, and aux."""
        resident = state.resident
        key = jax.random.fold_in(addresses.stream_key(state.key, 1), state.generation)

        def begin(params: Any, entry: Any) -> Any:
            if self.estimator.per_example:
                return *self.pieces.begin(params, entry, key), entry
            return self.pieces.begin(params, batch, key)[0]

        base_x, aux = ((), ()) if self.estimator.per_example else self.pieces.begin(resident, batch, key)
        entries = self._entries(batch) if self.estimator.per_example else jnp.zeros(self._own_streams()[1].shape)
        x = self._streams(begin, self.resident_plan, resident, entries, state)
        return add_device_axes((x, base_x)), add_device_axes(aux)

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
        """All streams after an updated block."""
        (x, base_x), aux = drop_device_axes(carry), drop_device_axes(aux)
        params = self.devices.gather(block)
        x = self._advance(functools.partial(self._through, aux=aux), self.block_plan, params, x, state, index)
        return add_device_axes((x, self.pieces.block(params, base_x, aux) if self.estimator.unperturbed else base_x))

    def _through(self, params: Any, carried: Any, *, aux: Any) -> Any:
        """One stream after a block; with a per-example estimator the stream carries its example and aux."""
        if not self.estimator.per_example:
            return self.pieces.block(params, carried, aux)
        x, aux, entry = carried
        return self.pieces.block(params, x, aux), aux, entry

    def end(self, state: OffloadState, carry: Any, batch: Any) -> FitnessReport:
        """The losses as minus fitness, and the coefficients."""
        estimator, (x, base_x) = self.estimator, drop_device_axes(carry)

        def end(params: Any, carried: Any) -> tuple[Array, Array]:
            x, entry = (carried[0], carried[2]) if estimator.per_example else (carried, batch)
            return total_and_weight(self.pieces.end(params, x, entry))

        parts = self._streams(end, self.resident_plan, state.resident, x, state)
        losses = self.devices.losses(parts, self.directions, len(estimator.signs))
        base = self.devices.ratio(end(state.resident, base_x)) if estimator.unperturbed else jnp.float32(jnp.nan)
        rank = max(self.resident_plan.max_rank, self.block_plan.max_rank)
        return report_losses(estimator, losses, base, sigma=state.sigma, rank=rank)

    def _streams(self, function: Callable, plan: Plan, params: Any, carried: Any, state: OffloadState) -> Any:
        """`function(member's params, what it carries)` for every direction and sign of this device: [a, b, ...]."""
        of_pair, inputs = self._of_pair(function, plan, params, state), (*self._own_streams(), carried)
        chunk = self._chunk(inputs)
        return jax.vmap(of_pair)(inputs) if chunk is None else jax.lax.map(of_pair, inputs, batch_size=chunk)

    def _advance(self, function: Callable, plan: Plan, params: Any, carried: Any, state: OffloadState, index: Array) -> Any:
        """`_streams` where what a stream carries keeps its shapes: the result takes the place of `carried`."""
        of_pair, own = self._of_pair(function, plan, params, state, index), self._own_streams()
        chunk = self._chunk(own)
        if chunk is None:
            return jax.vmap(of_pair)((*own, carried))

        def advance(first: Array | int, carried: Any, *, count: int = chunk) -> Any:
            inputs = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, count), (*own, carried))
            return jax.tree.map(
                lambda leaf, part: jax.lax.dynamic_update_slice_in_dim(leaf, part, first, 0), carried, jax.vmap(of_pair)(inputs)
            )

        whole, rest = divmod(own[0].shape[0], chunk)
        carried = jax.lax.fori_loop(0, whole, lambda step, carried: advance(step * chunk, carried), carried)
        return advance(whole * chunk, carried, count=rest) if rest else carried

    def _chunk(self, streams: Any) -> int | None:
        """Directions of this device evaluated at a time; None: all."""
        chunk = self.chunk_directions
        return None if chunk is None or chunk >= streams[0].shape[0] else chunk

    def _of_pair(
        self, function: Callable, plan: Plan, params: Any, state: OffloadState, index: Array | int = 0
    ) -> Callable[[Any], Any]:
        """`function` for the signs of one direction: `(direction, signs [b], what they carry [b, ...]) -> [b, ...]`."""
        shared = draw_shared(plan, state.key, state.generation, first_index=index)

        def of_pair(inputs: Any) -> Any:
            pair, signs, carried = inputs
            drawn = draw_pair(plan, state.key, state.generation, pair, first_index=index, shared=shared, late=True)

            def of_sign(sign: Array, carried: Any) -> Any:
                member = member_params(plan, params, drawn, sign=sign, sigma=state.sigma)
                return apply_perturbed(function, member, carried)

            return jax.vmap(of_sign)(signs, carried)

        return of_pair

    def defer(self, state: OffloadState, coefficients: Array) -> tuple[OffloadState, Array]:
        """The next state, with the update of this step pending, and whether the step is skipped.

        A skipped step changes nothing and does not advance the learning rate schedule.
        """
        skipped = is_skipped(coefficients, state.sigma)
        descent, safe = self.descent, jnp.where(skipped, 0.0, coefficients)
        moment, scale = next_moment(state.moment, safe, state.sigma, descent.second_moment or 0.0)
        scale = jnp.float32(1) if descent.second_moment is None else scale
        rate = jnp.where(skipped, 0.0, descent.rate(state.moment.steps))
        moment = jax.tree.map(lambda new, old: jnp.where(skipped, old, new), moment, state.moment)
        history = state.pending.history
        if history is not None:
            after = history.after(safe, state.generation, state.sigma)
            history = jax.tree.map(lambda new, old: jnp.where(skipped, old, new), after, history)
        pending = Pending(safe, state.generation, state.sigma, rate, scale, history)
        return state._replace(pending=pending, moment=moment, generation=state.generation + 1), skipped

    def update_resident(self, pending: Pending, run_key: Array, resident: Any) -> tuple[Any, Array]:
        """Apply the pending update to the resident parameters; also return their checksums, uint32 [2, leaves]."""
        return update_resident(self.descent, self.resident_plan, resident, pending, run_key)

    def update_block(self, pending: Pending, run_key: Array, block: Any, index: Array) -> tuple[Any, Array]:
        """Apply the pending update to this device's slices of a block; also return what it adds to the checksums."""
        new = update_block(self.descent, self.block_plan, block, pending, run_key, index, devices=self.devices)
        return new, self._sum_block(index, block, new)

    def sum_resident(self, resident: Any) -> Array:
        """Return the checksums of the resident parameters, twice: before and after no update."""
        sums = checksums.sum_resident(self.resident_plan, resident)
        return jnp.stack([sums, sums])

    def sum_block(self, block: Any, index: Array) -> Array:
        """Return what a block adds to the checksums of the stacked parameters, twice."""
        return self._sum_block(index, block, block)

    def _sum_block(self, index: Array, *blocks: Any) -> Array:
        return jnp.stack([checksums.sum_block(self.block_plan, block, index) for block in blocks])

    def sum_all(self, resident: Array, blocks: Array, state: OffloadState, new: OffloadState) -> Array:
        """Return the checksums before and after a step, uint32 [2, arrays], from those of the parameters."""
        rest = jnp.stack([checksums.sum_rest(state), checksums.sum_rest(new)])
        return jnp.concatenate([resident, blocks, rest], axis=1)

    def forward(self, block: Any, x: Any, aux: Any) -> Any:
        """One block, unperturbed."""
        x, aux = drop_device_axes(x), drop_device_axes(aux)
        return add_device_axes(self.pieces.block(self.devices.gather(block), x, aux))

    def first(self, resident: Any, batch: Any, key: Array) -> Any:
        """The start of an unperturbed stream, and aux."""
        return add_device_axes(self.pieces.begin(resident, batch, key))

    def loss(self, resident: Any, x: Any, batch: Any) -> Array:
        """The loss at the end of an unperturbed stream."""
        return self.devices.ratio(total_and_weight(self.pieces.end(resident, drop_device_axes(x), batch)))
