"""What turns the estimate into an update: optax transformations of zeroth-order fine-tuning."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from eggroll.noise.plan import Plan
from eggroll.noise.rules import paths
from eggroll.zo.optimizers.rebuilt_adam import RebuiltAdam, number, scale_by_rebuilt_adam
from eggroll.zo.optimizers.subspace_momentum import subspace_momentum

EXEMPT = r".*(bias|norm|ln_|layernorm).*"  # biases and normalisation do not decay


@dataclasses.dataclass(frozen=True)
class Descent:
    """theta -= learning_rate (g / scale + weight_decay theta), decoupled, where `adam` or `momentum` may take the place of g.

    Args:
        learning_rate: constant > 0, or schedule from step to it.
        weight_decay: >= 0.
        exempt: `re.fullmatch`, case ignored, on the path: parameters that do not decay.
        second_moment: decay rate in [0, 1) of MEAZO's one scalar second moment (arXiv 2605.03869), the scale; None: no scale.
        adam: m / (sqrt(v) + epsilon) of moments that are rebuilt at every step (AdaMeZO, `rebuilt_adam`).
        momentum: decay rate in [0, 1) of a momentum in the subspace that steps share (LOZO-M, `subspace_momentum`).

    Raises:
        ValueError: a number outside its range, two of the last three, or an `exempt` that is no pattern or has no effect.
        TypeError: `adam` is something else.
    """

    learning_rate: float | Callable[[Any], Any]
    _: dataclasses.KW_ONLY
    weight_decay: float = 0.0
    exempt: str = EXEMPT
    second_moment: float | None = None
    adam: RebuiltAdam | None = None
    momentum: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= number(self.weight_decay) < math.inf:
            raise ValueError(f"weight_decay must be a finite number >= 0, got {self.weight_decay!r}.")
        if not callable(self.learning_rate) and not 0 < number(self.learning_rate) < math.inf:
            raise ValueError(f"learning_rate must be a finite number > 0 or a schedule, got {self.learning_rate!r}.")
        for name in ("second_moment", "momentum"):
            if getattr(self, name) is not None and not 0 <= number(getattr(self, name)) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)!r}.")
        if not isinstance(self.adam, RebuiltAdam | None):
            raise TypeError(f"adam must be a zo.RebuiltAdam, got {self.adam!r}.")
        if self.exempt != EXEMPT and not self.weight_decay:
            raise ValueError(
                "exempt has no effect without weight_decay, from which it exempts parameters; give a weight_decay."
            )
        given = [name for name in ("second_moment", "adam", "momentum") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"only one of second_moment, adam and momentum can be given, got {' and '.join(given)}.")
        try:
            re.compile(self.exempt)
        except (re.error, TypeError) as error:
            raise ValueError(f"exempt {self.exempt!r} is not a regular expression: {error}.") from None

    def transformation(self, *, directions: int = 1, plan: Plan | None = None) -> optax.GradientTransformation:
        """The same as an optax transformation.

        Args:
            directions: coefficients a step; `adam` and `momentum` keep something for each.
            plan: of the parameters; only `momentum` needs it.

        Raises:
            ValueError: there is momentum and no plan, or no subspace that steps share.
        """
        parts: list[Any] = [] if self.second_moment is None else [scale_by_projected_gradient(self.second_moment)]
        if self.adam is not None:
            parts.append(scale_by_rebuilt_adam(self.adam, directions))
        if self.momentum is not None:
            if plan is None:
                raise ValueError("momentum follows the plan: give init a batch, or call plan_of(params, batch) before.")
            parts.append(subspace_momentum(self.momentum, plan, directions))
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

    Raises:
        ValueError: `decay` is outside its range.
    """
    if not 0 <= number(decay) < 1:
        raise ValueError(f"decay must be in [0, 1), got {decay!r}.")

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
