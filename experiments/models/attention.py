"""Causal attention with padding, grouped heads and rotary positions; statistics in float32."""

import jax
import jax.numpy as jnp
from jax import Array


def visible(mask: Array) -> Array:
    """Which positions each position sees: bool [B, T, T], itself and real tokens before it, from `mask` [B, T]."""
    causal = jnp.tril(jnp.ones((mask.shape[1], mask.shape[1]), bool))
    return causal[None] & mask[:, None, :]


def positions(mask: Array) -> Array:
    """Number of every real token, from 0: int32 [B, T]; -1 on padding before the first."""
    return jnp.cumsum(mask.astype(jnp.int32), axis=1) - 1


def attend(q: Array, k: Array, v: Array, seen: Array) -> Array:
    """Attend with H query heads that share K key heads.

    Args:
        q: [B, T, H, d].
        k: [B, T, K, d].
        v: [B, T, K, d].
        seen: bool [B, T, T], from `visible`.

    Returns:
        [B, T, H * d], in q's dtype.
    """
    batch, length, kv_heads, size = k.shape
    grouped = q.reshape(batch, length, kv_heads, -1, size)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=jnp.float32) * size**-0.5
    scores = jnp.where(seen[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, v).reshape(batch, length, -1)


def rotary_tables(position: Array, size: int, theta: float) -> tuple[Array, Array]:
    """Cosines and sines of every position and frequency: two float32 [B, T, size / 2]."""
    frequencies = theta ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    angles = position.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate the first half of each head against its second half: [B, T, heads, d]."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def layer_norm(x: Array, scale: Array, bias: Array, epsilon: float) -> Array:
    """Normalise the last axis to mean 0 and variance 1, then scale and shift."""
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def rms_norm(x: Array, scale: Array, epsilon: float) -> Array:
    """Normalise the last axis to mean square 1, then scale."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide * scale.astype(jnp.float32)).astype(x.dtype)
