"""An offloaded step as one program, whose loop copies blocks between the host's memory and the device.

    in_turn     every block is uploaded, updated, downloaded into its place, and used
    scan        the next block is uploaded while this one is used; the updated ones form a new stack, a second copy in the host
    two_stacks  even and odd blocks are stored apart: while one is used, the next is uploaded from the other stack and the
                updated one downloaded into its place

The programs of a block are those of `zo.offload`. With one stack that is read ahead and written in place XLA copies the whole
stack in every iteration, because it cannot tell the block that is read from the one that is written.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from eggroll.experiments.bench.offload.model import Step
from eggroll.zo.offload.devices import AXES, BATCH, SAME, is_sliced
from eggroll.zo.offload.state import OffloadState
from eggroll.zo.offload.streams import Streams

STACKS = PartitionSpec(None, AXES)
FORMS = {"in_turn": 1, "scan": 1, "two_stacks": 2}  # stacks of blocks


def make_program(step: Step, form: str, *, host: Callable[..., NamedSharding]) -> tuple[Any, tuple[Any, ...]]:
    """Return a jitted step and the shapes of its arguments; the stacks are donated.

    Args:
        step: an even number of blocks.
        form: see above.
        host: makes the sharding of arrays in the host's memory, from a mesh and a spec.

    Returns:
        `function(state without blocks, stacks, batch) -> (stacks, coefficients)`.
    """
    devices, count = step.streams.devices, FORMS[form]
    sharding = host(devices.mesh, STACKS)

    def stacked(leaf: Any) -> Any:
        shape = (step.num_blocks // count, *leaf.values.shape)
        values: Any = jax.ShapeDtypeStruct(shape, leaf.values.dtype, sharding=sharding)
        return dataclasses.replace(leaf, values=values)

    stacks = (jax.tree.map(stacked, step.block, is_leaf=is_sliced),) * count
    run = functools.partial(_run, step.streams, step.num_blocks, form)
    function = devices.spread(run, (SAME, STACKS, BATCH), (STACKS, SAME))
    places = jax.tree.map(lambda _: sharding, stacks), NamedSharding(devices.mesh, SAME)
    return jax.jit(function, donate_argnums=1, out_shardings=places), (step.state, stacks, step.batch)


def _run(streams: Streams, num_blocks: int, form: str, state: OffloadState, stacks: Any, batch: Any) -> Any:
    carry, aux = streams.begin(state, batch)

    def update(block: Any, index: Array) -> Any:
        return streams.update_block(state.pending, state.key, block, index)[0]

    def visit(block: Any, index: Array, carry: Any) -> Any:
        return streams.visit(state, block, index, carry, aux)

    new, carry = {"in_turn": _in_turn, "scan": _scan, "two_stacks": _two_stacks}[form](update, visit, num_blocks, stacks, carry)
    return new, streams.end(state, carry, batch).coefficients


def _in_turn(update: Callable, visit: Callable, num_blocks: int, stacks: Sequence[Any], carry: Any) -> Any:
    def body(index: Array, loop: Any) -> Any:
        stack, carry = loop
        block = update(_upload(stack, index), index)
        return _download(stack, block, index), visit(block, index, carry)

    stack, carry = jax.lax.fori_loop(0, num_blocks, body, (*stacks, carry))
    return (stack,), carry


def _scan(update: Callable, visit: Callable, num_blocks: int, stacks: Sequence[Any], carry: Any) -> Any:
    (stack,) = stacks

    def body(loop: Any, index: Array) -> Any:
        block, carry = loop
        coming = _upload(stack, index + 1)
        block = update(block, index)
        return (coming, visit(block, index, carry)), jax.tree.map(_to_host, block)

    (_, carry), new = jax.lax.scan(body, (_upload(stack, 0), carry), jnp.arange(num_blocks))
    return (new,), carry


def _two_stacks(update: Callable, visit: Callable, num_blocks: int, stacks: Sequence[Any], carry: Any) -> Any:
    def body(pair: Array, loop: Any) -> Any:
        evens, odds, even, carry = loop
        odd = _upload(odds, pair)
        even = update(even, 2 * pair)
        evens, carry = _download(evens, even, pair), visit(even, 2 * pair, carry)
        carry, odd = jax.lax.optimization_barrier((carry, odd))  # else both blocks are gathered and updated first
        even = _upload(evens, pair + 1)
        odd = update(odd, 2 * pair + 1)
        odds, carry = _download(odds, odd, pair), visit(odd, 2 * pair + 1, carry)
        return evens, odds, even, carry

    evens, odds, _, carry = jax.lax.fori_loop(0, num_blocks // 2, body, (*stacks, _upload(stacks[0], 0), carry))
    return (evens, odds), carry


def _upload(stack: Any, index: Array | int) -> Any:
    """Block `index` of a stack on the device; the last one where there are fewer."""

    def one(leaf: Array) -> Array:
        own = jax.lax.dynamic_index_in_dim(leaf, jnp.minimum(index, leaf.shape[0] - 1), keepdims=False)
        return jax.device_put(own, jax.memory.Space.Device)

    return jax.tree.map(one, stack)


def _download(stack: Any, block: Any, index: Array) -> Any:
    """The stack with a block from the device in its place."""
    return jax.tree.map(lambda leaf, own: jax.lax.dynamic_update_index_in_dim(leaf, _to_host(own), index, 0), stack, block)


def _to_host(leaf: Array) -> Array:
    return jax.device_put(leaf, jax.memory.Space.Host)
