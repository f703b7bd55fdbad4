"""Parameters and the tensors of a checkpoint, converted in pieces of at most `PIECE` numbers.

    parameter [L, in, out]  <->  L tensors [out, in], one per layer

Reading writes pieces into a parameter in place: memory holds the parameters read so far and a piece, and one layer if it is
quantised to int8. Writing cuts pieces out of a copy of one layer; an int8 layer becomes floats on its own. Owns neither the
files (`shards`, `export`) nor the table of parameters (`models.leaves`).
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from eggroll.llm.int8 import INTEGERS, SCALE, dequantise_matrix, is_quantised, quantise_matrix
from eggroll.llm.models.leaves import Leaf, Leaves
from eggroll.llm.shards import Shards

PIECE = 1 << 24


class Tensor(NamedTuple):
    """A tensor that is computed when it is written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[np.ndarray]]  # contiguous, in order

    @property
    def nbytes(self) -> int:
        """Bytes in a file."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def check_tensors(shards: Shards, leaves: Leaves) -> set[str]:
    """Return the names of a model's tensors in its files; ValueError unless all are there, with their shapes."""
    found = {shards.find(_names(leaf, 0), leaf.stored_shape) for leaf in leaves.resident.values()}
    for layer in range(leaves.layers):  # not leaf by leaf: a config.json may claim any number of layers
        for leaf in leaves.blocks.values():
            if layer >= leaf.first_layer:
                found.add(shards.find(_names(leaf, layer), leaf.stored_shape))
    return found


def _names(leaf: Leaf, layer: int) -> tuple[str, ...]:
    """Possible names of a tensor; a headless model has no "model."."""
    name = leaf.tensor.format(layer=layer)
    return name, name.removeprefix("model.")


def read_resident(shards: Shards, leaf: Leaf, dtype: np.dtype) -> Array:
    """Read a parameter that is not stacked."""
    return _read_layer(jnp.zeros((1, *leaf.shape), dtype), 0, shards, leaf, layer=0)[0]


def read_stack(shards: Shards, leaf: Leaf, layers: int, dtype: np.dtype) -> Array:
    """Read the parameter [layers, *shape] layer by layer."""
    stack = jnp.zeros((layers, *leaf.shape), dtype)
    for layer in range(leaf.first_layer, layers):
        stack = _read_layer(stack, layer, shards, leaf, layer=layer)
    return stack


def read_quantised_stack(shards: Shards, leaf: Leaf, layers: int, dtype: np.dtype) -> dict[str, Array]:
    """Read matrices layer by layer as int8 with scales of `dtype`: `int8.quantise` of `read_stack`."""
    inputs, outputs = leaf.shape
    stack = {INTEGERS: jnp.zeros((layers, inputs, outputs), jnp.int8), SCALE: jnp.zeros((layers, outputs), dtype)}
    matrix = jnp.zeros((1, inputs, outputs), dtype)
    for layer in range(leaf.first_layer, layers):
        matrix = _read_layer(matrix, 0, shards, leaf, layer=layer)
        stack = jax.block_until_ready(_put_quantised(stack, matrix, layer))
    return stack


def _read_layer(stack: Array, index: int, shards: Shards, leaf: Leaf, *, layer: int) -> Array:
    """Write the tensor of a layer into `stack[index]`; `stack` is consumed."""
    names = _names(leaf, layer)
    limit = PIECE if leaf.stored is None else None
    for start, piece in shards.read_pieces(names, leaf.stored_shape, limit=limit):
        part = piece.astype(stack.dtype, copy=False)
        part = part.T if leaf.transposed else part if leaf.stored is None else part.reshape(leaf.shape)
        stack = jax.block_until_ready(_put(stack, part[None], index, start, axis=2 if leaf.transposed else 1))
    return stack


@functools.partial(jax.jit, donate_argnums=0, static_argnames="axis")
def _put(stack: Array, part: Array, index: Array, start: Array, *, axis: int = 1) -> Array:
    """Write `part` into `stack[index]`, from `start` along `axis`; in place, as `stack` is donated."""
    starts = [index if i == 0 else start if i == axis else 0 for i in range(stack.ndim)]
    return lax.dynamic_update_slice(stack, part, starts)


@functools.partial(jax.jit, donate_argnums=0)
def _put_quantised(stack: dict[str, Array], matrix: Array, index: Array) -> dict[str, Array]:
    return {name: _put(stack[name], part, index, 0) for name, part in quantise_matrix(matrix).items()}


def stored_tensors(leaves: Leaves, params: Any) -> list[Tensor]:
    """Return the tensors of parameters, resident ones first, then layer by layer; nothing is computed yet."""
    tensors = [_tensor(leaf, leaf.tensor, params["resident"][name]) for name, leaf in leaves.resident.items()]
    for layer in range(leaves.layers):
        for name, leaf in leaves.blocks.items():
            if layer >= leaf.first_layer:
                tensors.append(_tensor(leaf, leaf.tensor.format(layer=layer), params["blocks"][name], layer))
    return tensors


def _tensor(leaf: Leaf, name: str, value: Any, layer: int | None = None) -> Tensor:
    dtype = np.dtype((value[SCALE] if is_quantised(value) else value).dtype)
    return Tensor(name, dtype, leaf.stored_shape, lambda: _pieces(leaf, value, layer))


def _pieces(leaf: Leaf, value: Any, layer: int | None) -> Iterator[np.ndarray]:
    whole = jax.tree.map(lambda array: _take(array, layer), value)
    whole = jnp.asarray(dequantise_matrix(whole) if is_quantised(whole) else whole)
    axis = 1 if leaf.transposed else 0
    rows = max(1, PIECE // max(1, whole.size // whole.shape[axis]))
    for start in range(0, whole.shape[axis], rows):
        # np.asarray of the parameter itself would keep a copy in host memory as long as the parameter lives.
        piece = np.asarray(lax.dynamic_slice_in_dim(whole, start, min(rows, whole.shape[axis] - start), axis))
        yield np.ascontiguousarray(piece.T if leaf.transposed else piece)


def _take(array: Any, layer: int | None) -> Any:
    """One layer of a stacked parameter; None: a parameter that is not stacked."""
    if isinstance(array, jax.Array) and len(array.devices()) > 1:
        return _assemble(array, layer)
    if layer is None or isinstance(array, np.ndarray):
        return array if layer is None else array[layer]
    return lax.dynamic_index_in_dim(array, layer, keepdims=False)


def _assemble(array: Array, layer: int | None) -> np.ndarray:
    """The same of an array over several devices, of which this process sees the whole."""
    if not (array.is_fully_addressable or array.is_fully_replicated):
        raise ValueError("parameters are spread over several processes: `eggroll.devices.processes.local` gathers them.")
    whole = np.empty(array.shape if layer is None else array.shape[1:], array.dtype)
    for shard in {str(shard.index): shard for shard in array.addressable_shards}.values():
        if layer is None:
            whole[shard.index] = np.asarray(shard.data)
            continue
        layers = range(array.shape[0])[shard.index[0]]
        if layer in layers:
            part = lax.dynamic_index_in_dim(shard.data, layer - layers.start, keepdims=False)
            whole[shard.index[1:]] = np.asarray(part)
    return whole
