"""One pass over an offloaded state: blocks are uploaded, updated, summed, and downloaded, two or three at a time.

for l in blocks:   w = upload(l);  w, checksums = update(w, pending);  yield w;  download(w)
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax import Array

from eggroll import programs
from eggroll.zo.offload.devices import BATCH, OWN, SAME, SLICES, Devices
from eggroll.zo.offload.state import OffloadState
from eggroll.zo.offload.streams import Streams

PROGRAMS: dict[str, tuple[Any, Any, int | None]] = {  # where inputs and outputs lie, and the input that is always consumed
    "update_resident": ((SAME, SAME, SAME), (SAME, SAME), None),
    "update_block": ((SAME, SAME, SLICES, SAME), (SLICES, SAME), 2),
    "sum_resident": ((SAME,), SAME, None),
    "sum_block": ((SLICES, SAME), SAME, None),
    "sum_all": ((SAME, SAME, SAME, SAME), SAME, None),
    "begin": ((SAME, BATCH), (OWN, OWN), None),
    "visit": ((SAME, SLICES, SAME, OWN, OWN), OWN, 3),
    "end": ((SAME, OWN, BATCH), SAME, None),
    "defer": ((SAME, SAME), SAME, None),
    "first": ((SAME, BATCH, SAME), OWN, None),
    "forward": ((SLICES, OWN, OWN), OWN, None),
    "loss": ((SAME, OWN, BATCH), SAME, None),
}


def program(streams: Streams, name: str, *, donate_argnums: int | None = None) -> Any:
    """Return the method `name` of the streams, compiled once for all devices."""
    ins, outs, consumed = PROGRAMS[name]
    donated = consumed if donate_argnums is None else donate_argnums

    def make() -> Callable:
        return jax.jit(streams.devices.spread(getattr(streams, name), ins, outs), donate_argnums=donated)

    return programs.remember(name, programs.Identity(streams), donated, make=make)


class Pass:
    """A pass that applies the pending update of a state, if there is one: `resident`, then `blocks` or `replaced_blocks`.

    Args:
        state: of an offloaded run.
        devices: its devices.
        streams: its programs; None where nothing is pending and nothing is summed.
        summed: keep checksums.
        consumes: the state is not used after the pass, which reuses its memory.
    """

    def __init__(
        self,
        state: OffloadState,
        devices: Devices,
        streams: Streams | None,
        *,
        summed: bool = False,
        consumes: bool = False,
    ):
        self._state, self._devices, self._streams, self._summed = state, devices, streams, summed
        self._consumes = consumes
        self._pending = state.is_pending
        self._resident_sums: Any = None  # checksums before and after, uint32 [2, leaves]
        self._block_sums: Any = 0

    def _program(self, name: str, **options: Any) -> Callable:
        assert self._streams is not None
        return program(self._streams, name, **options)

    def resident(self) -> Any:
        """Return the resident parameters after the pending update."""
        old = self._state.resident
        if self._pending:
            donated = 2 if self._consumes else None
            update = self._program("update_resident", donate_argnums=donated)
            new, self._resident_sums = update(self._state.pending, self._state.key, old)
            return new
        if self._summed:
            self._resident_sums = self._program("sum_resident")(old)
        return old

    def blocks(self) -> Iterator[Any]:
        """Yield the blocks on the device, after the pending update, while the next one is uploaded."""
        state, coming = self._state, _upload(self._state.blocks[0])
        for index, following in enumerate((*state.blocks[1:], None)):
            block, coming = coming, None if following is None else _upload(following)
            if self._pending:
                update = self._program("update_block")
                block, sums = update(state.pending, state.key, block, np.int32(index))
                self._block_sums = self._block_sums + sums
            elif self._summed:
                self._block_sums = self._block_sums + self._program("sum_block")(block, np.int32(index))
            yield block

    def replaced_blocks(self, done: list[Any]) -> Iterator[Any]:
        """Yield the updated blocks on the device; then append them to `done`, in the host's memory, and delete the old ones."""
        for block, old in zip(self.blocks(), self._state.blocks, strict=True):
            yield block
            done.append(jax.device_put(block, jax.tree.map(lambda _: self._devices.host, block)))
            jax.block_until_ready(done[max(0, len(done) - 2)])  # at most three blocks are on the device
            for leaf in jax.tree.leaves(old):
                leaf.delete()

    def checksums(self, new: OffloadState) -> Array:
        """Return the checksums after a pass, uint32 [2, arrays]: of the state, and of `new`, the one after it."""
        small = (tree._replace(resident=(), blocks=()) for tree in (self._state, new))
        return self._program("sum_all")(self._resident_sums, self._block_sums, *self._devices.replicate(tuple(small)))


def _upload(block: Any) -> Any:
    return jax.device_put(block, jax.tree.map(lambda leaf: leaf.sharding.with_memory_kind("device"), block))
