"""Causal attention with padding and grouped heads, and norms; statistics in float32."""

import jax
import jax.numpy as jnp
from jax import Array


def causal_mask(mask: Array) -> Array:
    """Return which positions each position attends to: bool [B, T, T], itself and real tokens before it; mask bool [B, T]."""
    causal = jnp.tril(jnp.ones((mask.shape[1], mask.shape[1]), bool))
    return causal[None] & mask[:, None, :]


def positions(mask: Array) -> Array:
    """Return the index of every real token, from 0: int32 [B, T]; -1 on padding before the first."""
    return jnp.cumsum(mask.astype(jnp.int32), axis=1) - 1


def attend(q: Array, k: Array, v: Array, seen: Array) -> Array:
    """Attend with H query heads that share K key heads.

    Args:
        q: [B, T, H, d].
        k: [B, S, K, d].
        v: [B, S, K, d].
        seen: bool [B, T, S]: which keys each query attends to.

    Returns:
        [B, T, H * d], in q's dtype.
    """
    return attend_by_head(q, k.swapaxes(1, 2), v.swapaxes(1, 2), seen)


def attend_by_head(q: Array, k: Array, v: Array, seen: Array) -> Array:
    """Attend as `attend`, with k and v [B, K, S, d], which saves the transpose of a long cache."""
    batch, length, _, size = q.shape
    grouped = q.reshape(batch, length, k.shape[1], -1, size)
    scores = jnp.einsum("btkgd,bksd->bkgts", grouped, k, preferred_element_type=jnp.float32) * size**-0.5
    scores = jnp.where(seen[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bksd->btkgd", weights, v).reshape(batch, length, -1)


def layer_norm(x: Array, scale: Array, bias: Array, epsilon: float) -> Array:
    """Normalise the last axis to mean 0 and variance 1, then scale and shift; computed in float32."""
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def rms_norm(x: Array, scale: Array, epsilon: float) -> Array:
    """Normalise the last axis to mean square 1, then scale; computed in float32."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide * scale.astype(jnp.float32)).astype(x.dtype)
