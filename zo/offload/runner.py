"""ZO2 (arXiv 2503.12668): fine-tuning of models larger than the device, with two or three blocks on it at a time.

The blocks lie in the host's memory. In a step every block is uploaded once, gets the update of the PREVIOUS step, runs all
perturbed streams while it is there, and goes back, while the next one is on its way:

    for l in blocks:   w = upload(l);  w = update(w, pending);  x_ks = block(w + s sigma E_kl, x_ks)  for all k, s;  download(w)

One program does this for every block; Python runs it L times, so that nothing on the device grows with L and the host holds the
blocks once. The pending update carries its own learning rate; `flush` applies it before evaluation, saving and export, which
refuse a state without. On a mesh the devices share all of it (`distributed`). Noise comes from the same addresses as without
offloading, so a step is that of `ZerothOrder` up to rounding.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from eggroll.devices.processes import whole
from eggroll.noise import addresses
from eggroll.noise.plan import Plan
from eggroll.noise.rules import check_params, refuse_quantised
from eggroll.update.precision import is_low
from eggroll.zo.blocks import Blocks, check_blocks, split_plan
from eggroll.zo.estimators import ESTIMATORS
from eggroll.zo.offload.devices import BATCH, OWN, SAME, SLICES, Devices, Sliced, is_sliced
from eggroll.zo.offload.streams import OffloadMetrics, OffloadState, Pending, Streams
from eggroll.zo.optimizers.descent import Descent, ProjectedMoment
from eggroll.zo.strategy import ZerothOrder


@dataclasses.dataclass(frozen=True)
class Offload:
    """Runs a `ZerothOrder` of a model in pieces with its blocks in the host's memory.

    Args:
        tuner: its loss is `Blocks`, its optimizer `Descent`; its mesh has the axes "population" and "data", or one of them.
        transfer_dtype: dtype of float32 blocks in the host's memory and on the way, such as bfloat16, rounded stochastically
            after every update; None: as they are. Blocks that are short floats are rounded stochastically too.

    Raises:
        TypeError, ValueError: a tuner that cannot be offloaded.
    """

    tuner: ZerothOrder
    transfer_dtype: Any = None
    _cache: dict = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.tuner.loss, Blocks):
            raise TypeError("only a model in pieces can be offloaded: the loss of the tuner must be Blocks.")
        if not isinstance(self.tuner.optimizer, Descent):
            raise TypeError("only Descent can be deferred block by block, got another optimizer.")
        if self.tuner.optimizer.momentum is not None:
            raise ValueError("momentum cannot be deferred block by block: its state would have to travel with the blocks.")
        _ = self.devices  # checks the mesh
        short = self.transfer_dtype is None or jnp.issubdtype(self.transfer_dtype, jnp.floating)
        if not short or (self.transfer_dtype is not None and jnp.dtype(self.transfer_dtype).itemsize > 2):
            raise ValueError(f"transfer_dtype must be a float of 16 bits or fewer, or None, got {self.transfer_dtype!r}.")

    @functools.cached_property
    def devices(self) -> Devices:
        """What runs a step."""
        return Devices(self.tuner.mesh)

    def init(self, params: Any, *, key: Array) -> OffloadState:
        """Make the state of a new run.

        Args:
            params: {"resident": ..., "blocks": ...}; the blocks may be NumPy arrays, or lie in the host's memory already.
            key: typed key, kept for the whole run.

        Raises:
            ValueError: the blocks are not stacked, or have short floats already where `transfer_dtype` is given.
        """
        addresses.check_key(key)
        count = check_blocks(params)
        check_params(params, self.tuner.perturbation)
        refuse_quantised(params, self.tuner.perturbation)
        if self.transfer_dtype is not None and any(is_low(leaf) for leaf in jax.tree.leaves(params["blocks"])):
            raise ValueError("transfer_dtype is for float32 blocks; these are short floats, which travel as they are.")
        blocks = tuple(jax.tree.map(lambda x, own=i: self._stored(x[own]), params["blocks"]) for i in range(count))
        zero, resident = jnp.float32(0), jax.tree.map(jnp.asarray, params["resident"])
        history = None if (adam := self.tuner.optimizer.adam) is None else adam.init(self.tuner.directions)
        sigma, none = jnp.float32(self.tuner.sigma), jnp.zeros(self.tuner.directions, jnp.float32)
        pending = Pending(none, jnp.int32(0), sigma, zero, jnp.float32(1), history)
        moment = ProjectedMoment(jnp.int32(0), zero)
        state = OffloadState(resident, (), pending, moment, key, jnp.int32(0), sigma)
        return self.devices.everywhere(state)._replace(blocks=blocks)

    def plan(self, state: OffloadState, batch: Any = None) -> Plan:
        """Read the plan, as `ZerothOrder.plan`; `step` and `loss` do it by themselves, `flush` of a restored state needs it."""
        self._streams(state, batch)
        return self.tuner.plan_of(_shapes(state), batch)

    def step(self, state: OffloadState, batch: Any = None) -> tuple[OffloadState, OffloadMetrics]:
        """Run one step; its own update stays pending. The blocks of `state` are used up: they are not copied.

        Args:
            state: from `init` or the last `step`.
            batch: any pytree that the pieces take; on a mesh with "data", examples along axis 0.

        Raises:
            ValueError: the devices along "data" do not divide the examples.
        """
        self.tuner.check_batch(batch)
        streams, batch, small = self._streams(state, batch), self.devices.batch(batch), state._replace(blocks=())
        resident, carry, aux = self._program("begin", streams.begin, (SAME, BATCH), (SAME, OWN, OWN))(small, batch)
        blocks, carry = self._each_block("visit", streams.visit, state, carry, aux)
        new, metrics = self._program("end", streams.end, (SAME, SAME, OWN, BATCH), SAME)(small, resident, carry, batch)
        return new._replace(blocks=blocks), metrics

    def flush(self, state: OffloadState) -> OffloadState:
        """Apply what is pending; the blocks of `state` are used up. A state without anything pending stays as it is."""
        if not float(state.pending.rate):
            return state
        if "streams" not in self._cache:
            raise ValueError("flush needs the plan: call plan(state, batch).")
        streams = self._cache["streams"]
        only_update = lambda small, block, index, carry, aux: (streams.moved_block(small, block, index), carry)  # noqa: E731
        blocks, _ = self._each_block("flush", only_update, state, None, None)
        resident = self._program("flush resident", streams.moved_resident, (SAME,), SAME)(state._replace(blocks=()))
        pending = state.pending._replace(rate=self.devices.everywhere(jnp.float32(0)))
        return state._replace(resident=resident, blocks=blocks, pending=pending)

    def loss(self, state: OffloadState, batch: Any, *, key: Array) -> Array:
        """The unperturbed loss of what `flush` returned, block by block; float32 [].

        Raises:
            ValueError: an update is pending, or the devices along "data" do not divide the examples.
        """
        if float(state.pending.rate):
            raise ValueError("an update is pending: evaluate flush(state).")
        streams, batch = self._streams(state, batch), self.devices.batch(batch)
        key = self.devices.everywhere(key)
        x, aux = self._program("loss first", streams.first, (SAME, BATCH, SAME), OWN)(state.resident, batch, key)
        forward = self._program("loss block", streams.forward, (SLICES, OWN, OWN), OWN)
        coming = _uploaded(state.blocks[0])
        for following in (*state.blocks[1:], None):
            block, coming = coming, None if following is None else _uploaded(following)
            x = jax.block_until_ready(forward(block, x, aux))
        return self._program("loss end", streams.loss, (SAME, OWN, BATCH), SAME)(state.resident, x, batch)

    def parameters(self, state: OffloadState) -> Any:
        """The parameters of what `flush` returned, in their own dtypes, for saving and export; blocks stacked, as NumPy arrays.

        Raises:
            ValueError: an update is pending.
        """
        if float(state.pending.rate):
            raise ValueError("an update is pending: save flush(state).")

        def stacked(*leaves: Sliced) -> np.ndarray:
            shape, dtype = leaves[0].shape, leaves[0].dtype
            return np.stack([whole(leaf.values)[: math.prod(shape)].reshape(shape).astype(dtype) for leaf in leaves])

        return {"resident": state.resident, "blocks": jax.tree.map(stacked, *state.blocks, is_leaf=is_sliced)}

    # --- inside -------------------------------------------------------------------------------------------------------

    def _stored(self, leaf: Any) -> Sliced:
        """A leaf of one block in the host's memory, as it travels."""
        travels = leaf.dtype == jnp.float32 and self.transfer_dtype is not None
        return self.devices.stored(np.asarray(leaf, self.transfer_dtype if travels else None), leaf.dtype)

    def _streams(self, state: OffloadState, batch: Any) -> Streams:
        shapes, tuner = _shapes(state), self.tuner
        plan = tuner.plan_of(shapes, batch)  # refuses parameters of other shapes
        if "streams" not in self._cache:
            resident_plan, block_plan = split_plan(plan, shapes)
            known: Any = {"pieces": tuner.loss, "estimator": ESTIMATORS[tuner.estimator], "descent": tuner.optimizer}
            known |= {"directions": tuner.directions, "chunk_directions": tuner.chunk_directions, "devices": self.devices}
            self._cache["streams"] = Streams(**known, resident_plan=resident_plan, block_plan=block_plan)
        return self._cache["streams"]

    def _each_block(self, name: str, visit: Callable, state: OffloadState, carry: Any, aux: Any) -> tuple[tuple, Any]:
        """Run `visit(state, block, index, carry, aux) -> (block, carry)` over the blocks, the next one on its way meanwhile."""
        ins, outs = (SAME, SLICES, SAME, OWN, OWN), (SLICES, OWN)
        where = jax.tree.map(lambda _: self.devices.host, state.blocks[0]), None
        run = self._program(name, visit, ins, outs, out_shardings=where, donate_argnums=3)
        small, done, coming = state._replace(blocks=()), [], _uploaded(state.blocks[0])
        for index, old in enumerate(state.blocks):
            block = coming
            coming = _uploaded(state.blocks[index + 1]) if index + 1 < len(state.blocks) else None
            new, carry = run(small, block, jnp.int32(index), carry, aux)
            done.append(new)
            jax.block_until_ready(done[max(0, index - 1)])  # so that no more than three are on the device
            for leaf in jax.tree.leaves(old):
                leaf.delete()
        return tuple(done), carry

    def _program(self, name: str, function: Callable, ins: Any, outs: Any, **options: Any) -> Callable:
        """`function` on all devices, compiled once."""
        if name not in self._cache:
            self._cache[name] = jax.jit(self.devices.spread(function, ins, outs), **options)
        return self._cache[name]


def _shapes(state: OffloadState) -> Any:
    """Shapes of the parameters as the model computes with them."""
    count = len(state.blocks)
    stacked = lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype)  # noqa: E731
    of = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)  # noqa: E731
    return {
        "resident": jax.tree.map(of, state.resident),
        "blocks": jax.tree.map(stacked, state.blocks[0], is_leaf=is_sliced),
    }


def _uploaded(block: Any) -> Any:
    return jax.device_put(block, jax.tree.map(lambda leaf: leaf.sharding.with_memory_kind("device"), block))
