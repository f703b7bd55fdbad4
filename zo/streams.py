"""The programs of an offloaded step: perturbed streams through one block, and the update that was deferred to it.

Everything here is traced; `offload` runs it, block after block.
"""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from eggroll import noise
from eggroll.estimator import gradient
from eggroll.interpret import apply_perturbed
from eggroll.plan import LeafPlan, Plan
from eggroll.population import draw_pair, draw_shared, member_params
from eggroll.precision import is_low, stochastic_round
from eggroll.rules import Frozen
from zo.blocks import Blocks
from zo.estimators import Estimator, coefficients
from zo.optimizers import Descent, ProjectedMoment, next_moment


class Pending(NamedTuple):
    """An update that the parameters do not have yet."""

    coefficients: Array  # float32 [n], -d
    generation: Array  # int32 [], of its noise
    rate: Array  # float32 [], its own learning rate; 0: nothing is pending
    scale: Array  # float32 [], of the second moment


class OffloadState(NamedTuple):
    """State of an offloaded run: a pytree."""

    resident: Any  # on the device
    blocks: tuple[Any, ...]  # one pytree for each of L blocks, in the host's memory
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
    """

    pieces: Blocks
    estimator: Estimator
    descent: Descent
    directions: int
    chunk_directions: int | None
    resident_plan: Plan
    block_plan: Plan

    def begin(self, state: OffloadState, batch: Any) -> Any:
        """The resident parameters with what is pending, where every stream starts, and aux."""
        resident = self.updated(self.resident_plan, state.resident, state)
        key = jax.random.fold_in(noise.stream_key(state.key, 1), state.generation)

        def begin(params: Any, _: Any) -> Any:
            return self.pieces.begin(params, batch, key)[0]

        base_x, aux = self.pieces.begin(resident, batch, key)
        nothing = jnp.zeros((self.directions, len(self.estimator.signs)))
        return resident, (self._streams(begin, self.resident_plan, resident, nothing, state), base_x), aux

    def visit(self, state: OffloadState, block: Any, index: Array, carry: Any, aux: Any) -> Any:
        """A block with what is pending, and all streams behind it."""
        x, base_x = carry
        stored = self.moved_block(state, block, index)
        own = _as_planned(self.block_plan, stored)
        x = self._streams(lambda params, x: self.pieces.block(params, x, aux), self.block_plan, own, x, state, index)
        return stored, (x, self.pieces.block(own, base_x, aux) if self.estimator.unperturbed else base_x)

    def end(self, state: OffloadState, resident: Any, carry: Any, batch: Any) -> tuple[OffloadState, OffloadMetrics]:
        """Losses, coefficients, and the next state but for its blocks."""
        estimator, (x, base_x) = self.estimator, carry
        end = lambda params, x: _ratio(self.pieces.end(params, x, batch))  # noqa: E731
        losses = self._streams(end, self.resident_plan, resident, x, state)
        base = _ratio(self.pieces.end(resident, base_x, batch)) if estimator.unperturbed else jnp.float32(jnp.nan)
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
        """`function(member's params, what it carries)` for every direction and sign: [n, S, ...]."""
        shared = draw_shared(plan, state.key, state.generation, first_index=index)

        def of_pair(inputs: Any) -> Any:
            pair, own = inputs
            drawn = draw_pair(plan, state.key, state.generation, pair, first_index=index, shared=shared)

            def of_sign(sign: Array, own: Any) -> Any:
                member = member_params(plan, params, drawn, sign=sign, sigma=state.sigma, in_loop=True)
                return apply_perturbed(function, member, own)

            return jax.vmap(of_sign)(jnp.asarray(self.estimator.signs, jnp.float32), own)

        directions, chunk = self.directions, self.chunk_directions
        pairs = jnp.arange(directions, dtype=jnp.int32)
        if chunk is None or chunk >= directions:
            return jax.vmap(of_pair)((pairs, carried))
        return jax.lax.map(of_pair, (pairs, carried), batch_size=chunk)

    def moved_block(self, state: OffloadState, block: Any, index: Array) -> Any:
        """One block with what is pending."""
        return self.updated(self.block_plan, block, state, first_index=index)

    def _deferred(self, state: OffloadState, found: Array, skipped: Array) -> OffloadState:
        """The state of the next step, to which the update of this one is pending; a skipped one counts for no schedule."""
        descent, safe = self.descent, jnp.where(skipped, 0.0, found)
        moment, scale = next_moment(state.moment, safe, state.sigma, descent.second_moment or 0.0)
        scale = jnp.float32(1) if descent.second_moment is None else scale
        rate = jnp.where(skipped, 0.0, descent.rate(state.moment.steps))
        moment = jax.tree.map(lambda new, old: jnp.where(skipped, old, new), moment, state.moment)
        pending = Pending(safe, state.generation, rate, scale)
        return state._replace(pending=pending, moment=moment, generation=state.generation + 1)

    def updated(self, plan: Plan, params: Any, state: OffloadState, *, first_index: Array | int = 0) -> Any:
        """Parameters with what is pending, in the dtypes they came in."""
        pending, descent = state.pending, self.descent
        where: dict[str, Any] = dict(noise_generation=pending.generation, sigma=state.sigma, first_index=first_index)
        ascent = jax.tree.leaves(gradient(plan, pending.coefficients, noise_key=state.key, **where))
        rounding = jax.random.fold_in(noise.stream_key(state.key, 2), pending.generation)
        rounding = jax.random.fold_in(rounding, first_index)

        def moved(leaf: Any, planned: LeafPlan, up: Array, number: int) -> Array:
            if isinstance(planned.spec, Frozen):
                return leaf
            wide = leaf.astype(jnp.float32)
            decay = descent.weight_decay if descent.decays_at(planned.path) else 0.0
            new = wide + pending.rate * (up / pending.scale - decay * wide)
            key = jax.random.fold_in(jax.random.fold_in(rounding, zlib.crc32(planned.path.encode())), number)
            return stochastic_round(new, leaf.dtype, key=key) if is_low(leaf) else new

        parts = zip(jax.tree.leaves(params), plan.leaves, ascent, range(len(ascent)), strict=True)
        return jax.tree.unflatten(plan.tree, [moved(*part) for part in parts])

    def forward(self, block: Any, x: Any, aux: Any) -> Any:
        """One block, unperturbed."""
        return self.pieces.block(_as_planned(self.block_plan, block), x, aux)

    def loss(self, resident: Any, x: Any, batch: Any) -> Array:
        """The loss at the end of an unperturbed stream."""
        return _ratio(self.pieces.end(resident, x, batch))


def _as_planned(plan: Plan, stored: Any) -> Any:
    """Stored parameters in the dtypes that the model computes in."""
    leaves = zip(jax.tree.leaves(stored), plan.leaves, strict=True)
    return jax.tree.unflatten(plan.tree, [leaf.astype(planned.dtype) for leaf, planned in leaves])


def _ratio(result: Any) -> Array:
    """A loss, or (total, weight), as float32 []."""
    total, weight = result if isinstance(result, tuple) else (result, 1.0)
    return jnp.asarray(total, jnp.float32) / jnp.asarray(weight, jnp.float32)
