"""Threefry-2x32 with 20 rounds (Salmon et al., SC 2011, "Parallel random numbers: as easy as 1, 2, 3"), in plain jnp.

The same function as `jax.random`'s, written elementwise and unrolled, so that it broadcasts under vmap, becomes one loop on
CPU instead of five small ones, and can run inside a kernel. `tests/test_noise.py` compares it with JAX's own.
"""

import jax.numpy as jnp
from jax import Array

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def threefry2x32(key: tuple[Array, Array], counter: tuple[Array, Array]) -> tuple[Array, Array]:
    """Encrypt 64-bit counters under 64-bit keys.

    Args:
        key: two uint32 arrays.
        counter: two uint32 arrays that broadcast with the key.

    Returns:
        Two uint32 arrays of random bits.
    """
    schedule = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(_PARITY))
    x0, x1 = counter[0] + schedule[0], counter[1] + schedule[1]
    for block in range(5):
        for rotation in _ROTATIONS[block % 2]:
            x0 = x0 + x1
            x1 = x0 ^ ((x1 << jnp.uint32(rotation)) | (x1 >> jnp.uint32(32 - rotation)))
        x0 = x0 + schedule[(block + 1) % 3]
        x1 = x1 + schedule[(block + 2) % 3] + jnp.uint32(block + 1)
    return x0, x1
