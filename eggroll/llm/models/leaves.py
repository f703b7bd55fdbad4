"""The parameters of a decoder as a table: shape, initial value, and the name of the tensor in a checkpoint."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

EMBEDDING_SCALE = 0.02
CONSTANTS = {"zeros": 0.0, "half": 0.5, "ones": 1.0}


class Leaf(NamedTuple):
    """One parameter, or one layer of a stacked parameter.

    Args:
        tensor: name in a checkpoint; "{layer}" stands for the index of the layer.
        shape: in the parameter tree.
        transposed: whether the checkpoint stores [out, in] for our [in, out].
        start: "matrix" (normal, variance 1 / in), "embedding" (normal, standard deviation 0.02), "zeros", "half" or "ones".
        stored: shape in the checkpoint, if it differs otherwise.
        first_layer: layers before this have no such tensor; ours is zeros there, without effect.
    """

    tensor: str
    shape: tuple[int, ...]
    transposed: bool = False
    start: str = "matrix"
    stored: tuple[int, ...] | None = None
    first_layer: int = 0

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in the checkpoint."""
        return self.stored or (self.shape[::-1] if self.transposed else self.shape)


class Leaves(NamedTuple):
    """All parameters of a model."""

    resident: dict[str, Leaf]
    blocks: dict[str, Leaf]
    layers: int


def linear_leaves(name: str, tensor: str, inputs: int, outputs: int, *, bias: bool) -> dict[str, Leaf]:
    """Return the leaves of a linear layer: a matrix [inputs, outputs] called `name`, and its bias if it has one."""
    leaves = {name: Leaf(f"{tensor}.weight", (inputs, outputs), transposed=True)}
    if bias:
        leaves[f"{name}_bias"] = Leaf(f"{tensor}.bias", (outputs,), start="zeros")
    return leaves


def init(leaves: Leaves, key: Array, dtype: DTypeLike = jnp.float32) -> Any:
    """Draw initial parameters.

    Args:
        leaves: the table of a model.
        key: typed key, consumed.
        dtype: of every parameter.

    Returns:
        {"resident": {...}, "blocks": {...}}.
    """
    keys = iter(jax.random.split(key, len(leaves.resident) + len(leaves.blocks)))
    resident = {name: _initial_value(leaf, leaf.shape, next(keys), dtype) for name, leaf in leaves.resident.items()}
    blocks = {
        name: _initial_value(leaf, (leaves.layers, *leaf.shape), next(keys), dtype) for name, leaf in leaves.blocks.items()
    }
    return {"resident": resident, "blocks": blocks}


def _initial_value(leaf: Leaf, shape: tuple[int, ...], key: Array, dtype: DTypeLike) -> Array:
    if leaf.start in CONSTANTS:
        return jnp.full(shape, CONSTANTS[leaf.start], dtype)
    scale = EMBEDDING_SCALE if leaf.start == "embedding" else 1 / math.sqrt(leaf.shape[0])
    return (scale * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def check_params(leaves: Leaves, params: Any) -> None:
    """Raise ValueError unless `params` has exactly the leaves and shapes of the table."""
    expected = {f"resident/{name}": leaf.shape for name, leaf in leaves.resident.items()}
    expected |= {f"blocks/{name}": (leaves.layers, *leaf.shape) for name, leaf in leaves.blocks.items()}
    flat = jax.tree_util.tree_leaves_with_path(params)
    got = {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in flat}
    for path in sorted({*expected, *got}):
        if expected.get(path) != got.get(path):
            raise ValueError(
                f"parameter '{path}' has shape {got.get(path, 'none: it is missing')}, "
                f"expected {expected.get(path, 'no parameter of that name')}."
            )
