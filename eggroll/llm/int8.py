"""Weight-only int8 matrices: symmetric, absolute maximum, a scale for every output channel.

    s_j = max_i |W_ij| / 127        Q_ij = round(W_ij / s_j)        x W  ->  (x Q) s

The matrices of the blocks of transformers and RWKV-7; embeddings, heads, biases, norms and other vectors stay floats. In the
parameter tree a matrix W becomes {"int8": Q, "scale": s}; `matmul` is the one place that knows. A column of zeros has the scale
0 and stays zeros, whatever Q becomes: RWKV-7 has such columns where they do nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from eggroll.llm.models.leaves import Leaves

LARGEST = 127
INTEGERS, SCALE = "int8", "scale"


def matmul(x: Array, w: Any) -> Array:
    """Return x W; W is a matrix [in, out], or {"int8": int8 [in, out], "scale": [out]} of it. The dtype is that of x."""
    if not is_quantised(w):
        return x @ w
    return (x @ w[INTEGERS].astype(x.dtype)) * w[SCALE]


def is_quantised(w: Any) -> bool:
    """Whether a parameter is a matrix in int8."""
    return isinstance(w, dict)


def quantise(leaves: Leaves, params: Any) -> Any:
    """Return parameters with the matrices of the blocks in int8, scales in the dtype that a matrix had."""
    names = {name for name, leaf in leaves.blocks.items() if leaf.start == "matrix"}
    blocks = {name: _quantised(leaf) if name in names else leaf for name, leaf in params["blocks"].items()}
    return params | {"blocks": blocks}


def _quantised(matrix: Array) -> dict[str, Array]:
    wide = matrix.astype(jnp.float32)
    scale = (jnp.max(jnp.abs(wide), axis=-2) / LARGEST).astype(matrix.dtype)
    steps = jnp.where(scale > 0, scale.astype(jnp.float32), 1)[..., None, :]
    return {INTEGERS: jnp.clip(jnp.round(wide / steps), -LARGEST, LARGEST).astype(jnp.int8), SCALE: scale}


def dequantise(params: Any) -> Any:
    """Return parameters with every matrix a float again, Q s, in the dtype of its scale; others as they are."""

    def floating(leaf: Any) -> Any:
        if not is_quantised(leaf):
            return leaf
        scale = jnp.asarray(leaf[SCALE])
        return (leaf[INTEGERS].astype(jnp.float32) * scale.astype(jnp.float32)[..., None, :]).astype(scale.dtype)

    return params | {"blocks": {name: floating(leaf) for name, leaf in params["blocks"].items()}}


def kinds(params: Any) -> Any:
    """A pytree like `params`: "int8" for the integers of matrices, "float" for all else; labels of `optax.multi_transform`."""

    def kind(path: Any, leaf: Any) -> str:
        return INTEGERS if jax.tree_util.keystr(path[-1:], simple=True) == INTEGERS else "float"

    return jax.tree_util.tree_map_with_path(kind, params)
