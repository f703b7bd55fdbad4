"""ZO2 (arXiv 2503.12668): fine-tune models larger than the device, two or three blocks on it at a time.

The blocks stay in the host's memory. A step uploads every block once, applies the update of the PREVIOUS step, runs all
perturbed streams through the block, and downloads it, while the next block is uploaded:

    for l in blocks:   w = upload(l);  w = update(w, pending);  x_ks = block(w + s sigma E_kl, x_ks)  for all k, s;  download(w)

Python runs the same programs for all L blocks, so nothing on the device grows with L, and the host stores the blocks once. The
pending update keeps the learning rate of its step. Noise comes from the same addresses as without offloading, so a step equals
that of `ZerothOrder` up to rounding. `eggroll.train` and `eggroll.DurableRun` take an `Offload` as any other strategy.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from eggroll import plans, programs
from eggroll.devices.processes import gather
from eggroll.noise import addresses
from eggroll.noise.plan import Plan
from eggroll.noise.rules import Perturbation, check_params, refuse_quantised
from eggroll.population.members import check_coefficients
from eggroll.population.metrics import FitnessReport, Metrics
from eggroll.protocol import Strategy
from eggroll.state import check_not_consumed
from eggroll.update.checksums import compare
from eggroll.update.precision import is_low
from eggroll.update.report import report_deferred
from eggroll.zo.blocks import Blocks, check_blocks, split_plan
from eggroll.zo.estimators import ESTIMATORS
from eggroll.zo.offload.checksums import checksum_names
from eggroll.zo.offload.devices import Devices, is_short_float, is_sliced
from eggroll.zo.offload.passes import Pass, program
from eggroll.zo.offload.state import OffloadState, Pending, begin
from eggroll.zo.offload.streams import Streams
from eggroll.zo.optimizers.descent import Descent, ProjectedMoment
from eggroll.zo.room import check_offloaded
from eggroll.zo.strategy import ZerothOrder


@dataclasses.dataclass(frozen=True)
class Offload:
    """A `ZerothOrder` of a model in pieces whose blocks stay in the host's memory.

    Args:
        tuner: its loss is `Blocks`, its optimizer `Descent`; its mesh has the axes "population" and "data", or one of them.
        transfer_dtype: dtype of float32 blocks in the host's memory and in transfers, such as bfloat16, rounded stochastically
            after every update; None: unchanged. Blocks of short floats are rounded stochastically too.

    Raises:
        TypeError, ValueError: a tuner that cannot be offloaded.
    """

    tuner: ZerothOrder
    transfer_dtype: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.tuner, ZerothOrder):
            raise TypeError(f"tuner must be a zo.ZerothOrder, got {type(self.tuner).__name__}.")
        if not isinstance(self.tuner.loss, Blocks):
            raise TypeError("only a model in pieces can be offloaded: the loss of the tuner must be Blocks.")
        if not isinstance(self.tuner.optimizer, Descent):
            raise TypeError("only Descent can be deferred block by block, got another optimizer.")
        if self.tuner.optimizer.momentum is not None:
            raise ValueError("momentum cannot be deferred block by block: its state would be transferred with the blocks.")
        if self.tuner.precision != "master":
            raise ValueError("precision has no effect on offloaded blocks, which are rounded stochastically; leave it out.")
        _ = self.devices  # checks the mesh
        if self.transfer_dtype is not None and not is_short_float(self.transfer_dtype):
            raise ValueError(f"transfer_dtype must be a float of 16 bits or fewer, or None, got {self.transfer_dtype!r}.")

    @functools.cached_property
    def devices(self) -> Devices:
        """The devices that run a step."""
        return Devices(self.tuner.mesh)

    noise_reuse = 1

    @property
    def population_size(self) -> int:
        """Members as the journal counts them: two per direction."""
        return self.tuner.population_size

    @property
    def precision(self) -> str:
        """How parameters are stored: "offloaded", with the transfer dtype; journals of resident runs have another value."""
        return "offloaded" if self.transfer_dtype is None else f"offloaded as {jnp.dtype(self.transfer_dtype).name}"

    @property
    def sigma(self) -> float:
        """Standard deviation of the perturbation."""
        return self.tuner.sigma

    @property
    def shaping(self) -> str:
        """The estimator."""
        return self.tuner.estimator

    @property
    def perturbation(self) -> Perturbation:
        """Noise of the directions."""
        return self.tuner.perturbation

    def init(self, params: Any, *, key: Array, batch: Any = None) -> OffloadState:
        """Make the state of a new run.

        Args:
            params: {"resident": ..., "blocks": ...}; the blocks may be NumPy arrays, or in the host's memory already.
            key: typed key, kept for the whole run.
            batch: as for `step`, to read the plan too; None: `step` or `plan` does it.

        Raises:
            ValueError: the blocks are not stacked, are short floats although `transfer_dtype` is given, or do not fit.
        """
        addresses.check_key(key)
        count = check_blocks(params)
        check_params(params, self.tuner.perturbation)
        refuse_quantised(params, self.tuner.perturbation)
        check_offloaded(params, self.devices.mesh, transfer_dtype=self.transfer_dtype)
        if self.transfer_dtype is not None and any(is_low(leaf) for leaf in jax.tree.leaves(params["blocks"])):
            raise ValueError("transfer_dtype is for float32 blocks; these are short floats, which are transferred unchanged.")
        store = functools.partial(self.devices.store, transfer_dtype=self.transfer_dtype)
        blocks = tuple(jax.tree.map(lambda x, index=i: store(x[index]), params["blocks"]) for i in range(count))
        state = self.devices.replicate(self.without_blocks(params["resident"], key))._replace(blocks=blocks)
        if batch is not None:
            self.plan(state, batch)
        return state

    def without_blocks(self, resident: Any, key: Array) -> OffloadState:
        """Return the state of a new run, all but its blocks and on no mesh."""
        zero, resident = jnp.float32(0), jax.tree.map(jnp.array, resident)  # a step reuses their memory
        history = None if (adam := self.tuner.optimizer.adam) is None else adam.init(self.tuner.directions)
        sigma, none = jnp.float32(self.tuner.sigma), jnp.zeros(self.tuner.directions, jnp.float32)
        pending = Pending(none, jnp.int32(0), sigma, zero, jnp.float32(1), history)
        return OffloadState(resident, (), pending, ProjectedMoment(jnp.int32(0), zero), key, jnp.int32(0), sigma)

    def plan(self, state: OffloadState, batch: Any = None) -> Plan:
        """Read the plan, as `ZerothOrder.plan`; `step` and `loss` do so themselves, `replay` and `flush` need it."""
        self._streams(state, batch)
        return self.tuner.plan_of(state.shapes, batch)

    def step(self, state: OffloadState, batch: Any = None) -> tuple[OffloadState, Metrics]:
        """Run one step; its own update stays pending. The arrays of `state` are consumed, not copied.

        Args:
            state: from `init` or the last `step`.
            batch: any pytree that the pieces take; on a mesh with "data", examples along axis 0.

        Returns:
            `(state, metrics)`, as `ZerothOrder.step`; gradient norms and the share of moved weights, which a deferred update
            does not know yet, are NaN.

        Raises:
            ValueError: the number of devices along "data" does not divide the number of examples.
        """
        state = begin(state)
        self.tuner.check_batch(batch)
        streams, batch = self._streams(state, batch), self.devices.batch(batch)
        run = Pass(state, self.devices, streams, summed=True, consumes=True)
        small = state._replace(resident=run.resident(), blocks=())
        blocks: list[Any] = []
        report = self._evaluate(streams, small, run.replaced_blocks(blocks), batch)
        new, skipped = self._defer(streams, small, report.coefficients)
        done = report_deferred(skipped, run.checksums(new))
        return new._replace(blocks=tuple(blocks)), Metrics(state.generation, state.sigma, *report, *done)

    def measure(self, state: OffloadState, batch: Any = None) -> FitnessReport:
        """Evaluate the losses of a step without making it; the state stays as it is."""
        state = begin(state)
        streams, batch = self._streams(state, batch), self.devices.batch(batch)
        run = self._pass(state)
        return self._evaluate(streams, state._replace(resident=run.resident(), blocks=()), run.blocks(), batch)

    def _evaluate(self, streams: Streams, small: OffloadState, blocks: Iterator[Any], batch: Any) -> FitnessReport:
        """The losses of all streams through the blocks."""
        carry, aux = program(streams, "begin")(small, batch)
        visit = program(streams, "visit")
        for index, block in enumerate(blocks):
            carry = visit(small, block, np.int32(index), carry, aux)
        return program(streams, "end")(small, carry, batch)

    def replay(
        self, state: OffloadState, coefficients: Any, *, mean_fitness: Any = None, checksums: Any = None
    ) -> OffloadState:
        """Repeat a step without evaluating anything; the arrays of `state` are consumed.

        Args:
            state: before the step; the plan is known.
            coefficients: float32 [n], `Metrics.coefficients` of the step.
            mean_fitness: of no use to `Descent`.
            checksums: its `Metrics.checksums[1]`, to compare with; None: nothing is compared.

        Returns:
            The state as `step` left it, bit for bit on the same backend.

        Raises:
            ValueError: wrong length, or no plan yet. `OtherState`: other values than `step` left.
        """
        coefficients = check_coefficients(coefficients, population_size=self.population_size)
        state = begin(state)
        streams = self._known_streams(state, "replay")
        run = Pass(state, self.devices, streams, summed=checksums is not None, consumes=True)
        new = self._defer(streams, self._apply_pending(run, state), coefficients)[0]
        if checksums is not None:
            compare(checksum_names(new), checksums, run.checksums(new)[1])
        return new

    def checksums(self, state: OffloadState) -> dict[str, int]:
        """Return the checksum of every array of a state by name, in the order of `Metrics.checksums`; the plan is known."""
        check_not_consumed(state)
        run = Pass(state, self.devices, self._known_streams(state, "checksums"), summed=True)
        run.resident()
        collections.deque(run.blocks(), maxlen=0)
        return dict(zip(checksum_names(state), np.asarray(run.checksums(state)[0]).tolist(), strict=True))

    def flush(self, state: OffloadState) -> OffloadState:
        """Apply the pending update; the arrays of `state` are consumed. Without a pending update the state is unchanged.

        The next step starts from the same parameters, but the state is another one: `DurableRun.adopt` it in a durable run.
        """
        check_not_consumed(state)
        return self._apply_pending(self._pass(state, consumes=True), state) if state.is_pending else state

    def _apply_pending(self, run: Pass, state: OffloadState) -> OffloadState:
        resident, blocks = run.resident(), list[Any]()
        collections.deque(run.replaced_blocks(blocks), maxlen=0)
        pending = state.pending._replace(rate=self.devices.replicate(jnp.float32(0)))
        return state._replace(resident=resident, blocks=tuple(blocks), pending=pending)

    def loss(self, state: OffloadState, batch: Any, *, key: Array) -> Array:
        """Return the unperturbed loss, block by block, float32 []; the state stays as it is.

        Raises:
            ValueError: the number of devices along "data" does not divide the number of examples.
        """
        check_not_consumed(state)
        streams, batch = self._streams(state, batch), self.devices.batch(batch)
        run, key = self._pass(state), self.devices.replicate(key)
        resident = run.resident()
        x, aux = program(streams, "first")(resident, batch, key)
        forward = program(streams, "forward")
        for block in run.blocks():
            x = jax.block_until_ready(forward(block, x, aux))
        return program(streams, "loss")(resident, x, batch)

    def parameters(self, state: OffloadState) -> Any:
        """Return the parameters in their own dtypes, blocks stacked as NumPy arrays; the state stays as it is."""
        check_not_consumed(state)
        like = jax.tree.leaves(state.blocks[0], is_leaf=is_sliced)
        stacked = [np.empty((len(state.blocks), *leaf.shape), leaf.dtype) for leaf in like]
        run = self._pass(state)
        resident = run.resident()
        for index, block in enumerate(run.blocks()):
            for array, leaf in zip(stacked, jax.tree.leaves(block, is_leaf=is_sliced), strict=True):
                array[index] = gather(leaf.values)[: math.prod(leaf.shape)].reshape(leaf.shape).astype(leaf.dtype)
        arrays = [leaf.typed(array) for leaf, array in zip(like, stacked, strict=True)]
        blocks = jax.tree.unflatten(jax.tree.structure(state.blocks[0], is_leaf=is_sliced), arrays)
        return {"resident": resident, "blocks": blocks}

    def _streams(self, state: OffloadState, batch: Any) -> Streams:
        shapes = state.shapes
        return self.streams_of(self.tuner.plan_of(shapes, batch), shapes)

    def _known_streams(self, state: OffloadState, needed_by: str) -> Streams:
        shapes = state.shapes
        return self.streams_of(plans.known_plan(self.tuner, shapes, needed_by=needed_by), shapes)

    def streams_of(self, plan: Plan, shapes: Any) -> Streams:
        """Return the programs of a step, for parameters of these shapes."""

        def make() -> Streams:
            loss, options = self.tuner.loss, (self.tuner.directions, self.tuner.chunk_directions)
            assert isinstance(loss, Blocks)
            parts = loss, ESTIMATORS[self.tuner.estimator], self.tuner.optimizer
            return Streams(*parts, *options, *split_plan(plan, shapes), self.devices)

        return programs.remember("streams", self.tuner, programs.Identity(plan), make=make)

    def _pass(self, state: OffloadState, *, consumes: bool = False) -> Pass:
        """A pass without checksums."""
        streams = self._known_streams(state, "a pending update") if state.is_pending else None
        return Pass(state, self.devices, streams, consumes=consumes)

    def _defer(self, streams: Streams, state: OffloadState, coefficients: Array) -> tuple[OffloadState, Array]:
        small = state._replace(resident=(), blocks=())
        new, skipped = program(streams, "defer")(*self.devices.replicate((small, coefficients)))
        return new._replace(resident=state.resident, blocks=state.blocks), skipped


_: type[Strategy[OffloadState]] = Offload  # checked by mypy
