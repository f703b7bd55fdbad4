"""Adam whose moments are rebuilt at every step from the last h steps' coefficients, not stored (AdaMeZO, arXiv 2605.00650).

    m = sum_j b1^j g_{t-j} / sum_j b1^j        v = sum_j b2^j g_{t-j}^2 / sum_j b2^j        j < min(t + 1, h)
    theta -= learning_rate m / (sqrt(v) + epsilon)

g_{t-j} is the estimate of that step, its noise drawn again from its address. The sums are divided by the weights that are in
them: that is Adam's own correction of the bias until h steps are over, and corrects for the terms that are cut off afterwards,
which the paper leaves out. The moments of one block of a parameter are there at a time.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from eggroll.update.history import History
from eggroll.update.optimizer import NoiseSource


def number(value: Any) -> float:
    """A setting as a number, of Python, NumPy or JAX; NaN, which is in no range, if it is none."""
    is_array = hasattr(value, "dtype") and value.shape == () and not jnp.issubdtype(value.dtype, jnp.complexfloating)
    return float(value) if is_array or isinstance(value, int | float) else math.nan


@dataclasses.dataclass(frozen=True)
class RebuiltAdam:
    """Settings of the rebuilt moments.

    Args:
        b1: decay rate of the first moment, in [0, 1).
        b2: of the second.
        history: h >= 1, steps that the moments are made of; an update draws the noise of so many steps, without forwards.
        epsilon: added to the root, > 0.

    Raises:
        ValueError: a number outside its range.
    """

    b1: float = 0.9
    b2: float = 0.999
    history: int = 10
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        for name in ("b1", "b2"):
            if not 0 <= number(getattr(self, name)) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)!r}.")
        if not (isinstance(self.history, int) and self.history >= 1):
            raise ValueError(f"history must be an integer >= 1, got {self.history!r}.")
        if not 0 < number(self.epsilon) < math.inf:
            raise ValueError(f"epsilon must be a finite number > 0, got {self.epsilon!r}.")

    def init(self, directions: int) -> History:
        """The history before the first step, with n coefficients a step."""
        return History.before_first(self.history, directions)

    def ascent(self, history: History, estimate: Callable[..., Array]) -> Array:
        """m / (sqrt(v) + epsilon) of one parameter, or of a part of it.

        Args:
            history: with this step.
            estimate: `estimate(coefficients, noise_generation=, sigma=)`, the ascent estimate of a step, float32.

        Returns:
            float32, like an estimate.
        """
        age = jnp.arange(self.history)
        taken = (age < history.steps).astype(jnp.float32)
        weights = [taken * jnp.float32(b) ** age.astype(jnp.float32) for b in (self.b1, self.b2)]
        shares = [weight / jnp.maximum(weight.sum(), 1.0) for weight in weights]  # 0 before the first step

        def add(moments: Any, past: Any) -> tuple[tuple[Array, Array], None]:
            first, second, coefficients, generation, sigma = past
            g = estimate(coefficients, noise_generation=generation, sigma=sigma)
            return (moments[0] + first * g, moments[1] + second * g**2), None

        steps = (*shares, history.coefficients, history.generations, history.sigmas)
        like = jax.eval_shape(lambda: add((0.0, 0.0), jax.tree.map(lambda x: x[0], steps))[0])
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), like)
        (m, v), _ = jax.lax.scan(add, zeros, steps)
        return m / (jnp.sqrt(v) + self.epsilon)


def scale_by_rebuilt_adam(settings: RebuiltAdam, directions: int) -> optax.GradientTransformationExtraArgs:
    """The same as an optax transformation, first in a chain: it replaces the updates that come in.

    Args:
        settings: decay rates and h.
        directions: coefficients a step: directions, or pairs of an `EvolutionStrategy`.
    """

    def init(params: Any) -> History:
        return settings.init(directions)

    def update(
        updates: Any, state: History, params: Any = None, *, coefficients: Array, sigma: Array, noise: NoiseSource, **_: Any
    ) -> Any:
        state = state.after(coefficients, noise.generation, sigma)
        return noise.map_estimates(lambda estimate, history: -settings.ascent(history, estimate), updates, state), state

    return optax.GradientTransformationExtraArgs(init, update)
