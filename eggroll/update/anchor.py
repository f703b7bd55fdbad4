"""Decoupled decay towards the parameters that a run began with, instead of towards zero.

    update <- update + rate (w - w_0)        before the step size, as in AdamW

Evolution strategies move every weight a little, also where fitness says nothing; pulled to where they began, such weights stay
and what a model knew before is kept (Anchored Weight Decay, arXiv 2605.30148).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class AnchorState(NamedTuple):
    """The parameters at the beginning."""

    anchor: Any  # like the parameters


def anchored_decay(rate: float) -> optax.GradientTransformation:
    """Pull parameters towards their first values; put it where `optax.add_decayed_weights` would be.

    Args:
        rate: share of the distance, times the step size, that a step takes back, >= 0.

    Raises:
        ValueError: the rate is negative or not finite.
    """
    if not 0 <= rate < float("inf"):
        raise ValueError(f"rate must be a finite number >= 0, got {rate}.")

    def init(params: Any) -> AnchorState:
        return AnchorState(jax.tree.map(jnp.array, params))

    def update(updates: Any, state: AnchorState, params: Any = None) -> tuple[Any, AnchorState]:
        if params is None:
            raise ValueError("anchored_decay needs the parameters: call update(updates, state, params).")
        pulled = jax.tree.map(lambda u, w, first: u + (rate * (w - first)).astype(u.dtype), updates, params, state.anchor)
        return pulled, state

    return optax.GradientTransformation(init, update)
