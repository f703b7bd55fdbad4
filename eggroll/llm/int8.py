"""Weight-only int8 matrices: symmetric, absolute maximum, a scale for every output channel.

    s_j = max_i |W_ij| / 127        Q_ij = round(W_ij / s_j)        x W  ->  (x Q) s

Quantises the matrices in the blocks of transformers and RWKV-7; embeddings, heads, biases, norms and other vectors stay floats.
In the parameter tree a matrix W becomes {"int8": Q, "scale": s}; only `matmul` needs to know. A column of zeros has scale 0 and
stays zero, whatever Q becomes: RWKV-7 has such columns in its first layer.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from eggroll.llm.models.leaves import Leaves

LARGEST = 127
INTEGERS, SCALE = "int8", "scale"


def matmul(x: Array, w: Any) -> Array:
    """Return x W in the dtype of x; W is a matrix [in, out], or its {"int8": int8 [in, out], "scale": [out]}."""
    if not is_quantised(w):
        return x @ w
    return (x @ w[INTEGERS].astype(x.dtype)) * w[SCALE]


def is_quantised(w: Any) -> bool:
    """Return whether a parameter is a quantised matrix."""
    return isinstance(w, dict)


def matrices(leaves: Leaves) -> set[str]:
    """Return the names of the parameters in the blocks that `quantise` converts."""
    return {name for name, leaf in leaves.blocks.items() if leaf.start == "matrix"}


def quantise(leaves: Leaves, params: Any) -> Any:
    """Return parameters with the matrices of the blocks in int8 and their scales in the dtype of the matrix."""
    names = matrices(leaves)
    blocks = {name: quantise_matrix(leaf) if name in names else leaf for name, leaf in params["blocks"].items()}
    return params | {"blocks": blocks}


@jax.jit
def quantise_matrix(matrix: Array) -> dict[str, Array]:
    """Return matrices [..., in, out] in int8, and their scales [..., out]; without temporaries of their size."""
    wide = matrix.astype(jnp.float32)
    scale = (jnp.max(jnp.abs(wide), axis=-2) / LARGEST).astype(matrix.dtype)
    steps = jnp.where(scale > 0, scale.astype(jnp.float32), 1)[..., None, :]
    return {INTEGERS: jnp.clip(jnp.round(wide / steps), -LARGEST, LARGEST).astype(jnp.int8), SCALE: scale}


def dequantise(params: Any) -> Any:
    """Return parameters with every quantised matrix as floats."""
    blocks = {name: dequantise_matrix(leaf) if is_quantised(leaf) else leaf for name, leaf in params["blocks"].items()}
    return params | {"blocks": blocks}


@jax.jit
def dequantise_matrix(w: dict[str, Array]) -> Array:
    """Return quantised matrices as floats, Q s, in the dtype of the scale."""
    scale = w[SCALE]
    return (w[INTEGERS].astype(jnp.float32) * scale.astype(jnp.float32)[..., None, :]).astype(scale.dtype)


def optimizer_labels(params: Any) -> Any:
    """Label leaves for `optax.multi_transform`: "int8" for the integers of quantised matrices, "float" for all others."""

    def label(path: Any, leaf: Any) -> str:
        return INTEGERS if jax.tree_util.keystr(path[-1:], simple=True) == INTEGERS else "float"

    return jax.tree_util.tree_map_with_path(label, params)
