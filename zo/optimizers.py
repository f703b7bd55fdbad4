"""What turns the estimate into an update: optax transformations of zeroth-order fine-tuning."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from eggroll.rules import paths

EXEMPT = r".*(bias|norm|ln_|layernorm).*"  # biases and normalisation do not decay


def zo_optimizer(
    learning_rate: float | Callable[[Any], Any],
    *,
    weight_decay: float = 0.0,
    exempt: str = EXEMPT,
    second_moment: float | None = None,
) -> optax.GradientTransformation:
    """theta -= learning_rate (g / scale + weight_decay theta), decoupled.

    Args:
        learning_rate: constant, or schedule from step to it.
        weight_decay: >= 0.
        exempt: `re.fullmatch`, case ignored, on the path: parameters that do not decay.
        second_moment: decay rate in [0, 1) of MEAZO's one scalar second moment (arXiv 2605.03869), the scale; None: no scale.

    Raises:
        ValueError: a number outside its range.
    """
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must be >= 0, got {weight_decay!r}.")
    if not callable(learning_rate) and not 0 < learning_rate < float("inf"):
        raise ValueError(f"learning_rate must be a finite number > 0 or a schedule, got {learning_rate!r}.")
    parts: list[Any] = [] if second_moment is None else [scale_by_projected_gradient(second_moment)]
    if weight_decay:
        parts.append(optax.add_decayed_weights(weight_decay, mask=lambda params: _decays(params, exempt)))
    return optax.chain(*parts, optax.scale_by_learning_rate(learning_rate))


def _decays(params: Any, exempt: str) -> Any:
    pattern = re.compile(exempt, re.IGNORECASE)
    return jax.tree.unflatten(jax.tree.structure(params), [not pattern.fullmatch(path) for path in paths(params)])


class ProjectedMoment(NamedTuple):
    """State of `scale_by_projected_gradient`."""

    steps: Array  # int32 []
    moment: Array  # float32 [], mean square of projected gradients


def scale_by_projected_gradient(decay: float = 0.99, epsilon: float = 1e-8) -> optax.GradientTransformationExtraArgs:
    """Divide the estimate by the root of one scalar: the decayed mean square of the projected gradients (MEAZO).

    Args:
        decay: in [0, 1).
        epsilon: added to the root.

    Raises:
        ValueError: decay outside [0, 1).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"second_moment must be in [0, 1), got {decay!r}.")

    def init(params: Any) -> ProjectedMoment:
        return ProjectedMoment(jnp.int32(0), jnp.float32(0))

    def update(updates: Any, state: Any, params: Any = None, *, coefficients: Array, sigma: Array, **_: Any) -> Any:
        projected = coefficients / (2 * sigma)
        moment = decay * state.moment + (1 - decay) * jnp.mean(projected**2)
        steps = state.steps + 1
        root = jnp.sqrt(moment / (1 - decay ** steps.astype(jnp.float32))) + epsilon
        return jax.tree.map(lambda u: u / root, updates), ProjectedMoment(steps, moment)

    return optax.GradientTransformationExtraArgs(init, update)
