"""A causal language model that continues texts, in two pure functions.

    logits, cache = prefill(params, tokens, mask, max_new_tokens)     all prompts at once
    logits, cache = step(params, cache, token)                        one more token of every text

Prompts of different lengths are padded on the left, so that all of them end at the same position; no text sees padding, and
positions count real tokens only. A cache holds the prompts and at most `max_new_tokens` further tokens: keys and values, or the
state of a recurrent model. Both functions return what the whole-text functions of `decoder` return at the same positions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import Array


class Generator(NamedTuple):
    """The two functions of a model."""

    prefill: Callable[[Any, Array, Array, int], tuple[Array, Any]]  # int32 [B, T], bool [B, T] -> float32 [B, V], cache
    step: Callable[[Any, Any, Array], tuple[Array, Any]]  # cache, int32 [B] -> float32 [B, V], cache
