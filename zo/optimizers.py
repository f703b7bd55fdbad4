"""What turns the estimate into an update: optax transformations of zeroth-order fine-tuning."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from eggroll.rules import paths

EXEMPT = r".*(bias|norm|ln_|layernorm).*"  # biases and normalisation do not decay


@dataclasses.dataclass(frozen=True)
class Descent:
    """theta -= learning_rate (g / scale + weight_decay theta), decoupled.

    Args:
        learning_rate: constant > 0, or schedule from step to it.
        weight_decay: >= 0.
        exempt: `re.fullmatch`, case ignored, on the path: parameters that do not decay.
        second_moment: decay rate in [0, 1) of MEAZO's one scalar second moment (arXiv 2605.03869), the scale; None: no scale.

    Raises:
        ValueError: a number outside its range, or `exempt` is no pattern.
    """

    learning_rate: float | Callable[[Any], Any]
    _: dataclasses.KW_ONLY
    weight_decay: float = 0.0
    exempt: str = EXEMPT
    second_moment: float | None = None

    def __post_init__(self) -> None:
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must be >= 0, got {self.weight_decay!r}.")
        if not callable(self.learning_rate) and not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate must be a finite number > 0 or a schedule, got {self.learning_rate!r}.")
        if self.second_moment is not None and not 0 <= self.second_moment < 1:
            raise ValueError(f"second_moment must be in [0, 1), got {self.second_moment!r}.")
        try:
            re.compile(self.exempt)
        except (re.error, TypeError) as error:
            raise ValueError(f"exempt {self.exempt!r} is not a regular expression: {error}.") from None

    def transformation(self) -> optax.GradientTransformation:
        """The same as an optax transformation."""
        parts: list[Any] = [] if self.second_moment is None else [scale_by_projected_gradient(self.second_moment)]
        if self.weight_decay:
            parts.append(optax.add_decayed_weights(self.weight_decay, mask=self.decays))
        return optax.chain(*parts, optax.scale_by_learning_rate(self.learning_rate))

    def rate(self, step: Array) -> Array:
        """The learning rate of a step, float32 []."""
        return jnp.asarray(self.learning_rate(step) if callable(self.learning_rate) else self.learning_rate, jnp.float32)

    def decays(self, params: Any) -> Any:
        """A pytree like `params`: whether a parameter decays."""
        return jax.tree.unflatten(jax.tree.structure(params), [self.decays_at(path) for path in paths(params)])

    def decays_at(self, path: str) -> bool:
        """Whether the parameter at a path decays."""
        return not re.fullmatch(self.exempt, path, re.IGNORECASE)


class ProjectedMoment(NamedTuple):
    """State of `scale_by_projected_gradient`."""

    steps: Array  # int32 []
    moment: Array  # float32 [], mean square of projected gradients


def scale_by_projected_gradient(decay: float = 0.99, epsilon: float = 1e-8) -> optax.GradientTransformationExtraArgs:
    """Divide the estimate by the root of one scalar: the decayed mean square of the projected gradients (MEAZO).

    Args:
        decay: in [0, 1).
        epsilon: added to the root.
    """

    def init(params: Any) -> ProjectedMoment:
        return ProjectedMoment(jnp.int32(0), jnp.float32(0))

    def update(updates: Any, state: Any, params: Any = None, *, coefficients: Array, sigma: Array, **_: Any) -> Any:
        state, scale = next_moment(state, coefficients, sigma, decay, epsilon)
        return jax.tree.map(lambda u: u / scale, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def next_moment(
    state: ProjectedMoment, coefficients: Array, sigma: Array, decay: float, epsilon: float = 1e-8
) -> tuple[ProjectedMoment, Array]:
    """Take the coefficients [n] of a step into the moment; return it and the scale, float32 []."""
    projected = coefficients / (2 * sigma)
    moment = decay * state.moment + (1 - decay) * jnp.mean(projected**2)
    steps = state.steps + 1
    return ProjectedMoment(steps, moment), jnp.sqrt(moment / (1 - decay ** steps.astype(jnp.float32))) + epsilon
