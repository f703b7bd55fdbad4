"""threefry2x32 as plain operations: in kernels, and on CPU, where XLA makes one loop of them and several of the primitive."""

import jax.numpy as jnp
from jax import Array

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))  # Salmon et al. 2011


def threefry(key: tuple[Array, Array], counter: Array, *, high: Array | None = None) -> tuple[Array, Array]:
    """threefry2x32(key, (high, counter)), 20 rounds, elementwise: two words of every address; `high` is 0 by default."""
    keys = (*key, key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
    left, right = key[0] if high is None else high + key[0], counter + key[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            left = left + right
            right = left ^ ((right << jnp.uint32(rotation)) | (right >> jnp.uint32(32 - rotation)))
        left = left + keys[(group + 1) % 3]
        right = right + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return left, right
