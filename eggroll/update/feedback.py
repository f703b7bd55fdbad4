"""Error feedback for int8 parameters: what rounding leaves over reaches later steps, and is rebuilt instead of stored.

Steps are divided into windows of h. With u_j the update of the window's j-th step and U_k = u_1 + ... + u_k:

    w <- w + floor(d + U_k) - floor(d + U_{k-1}), within [-127, 127]        d uniform in [0, 1), drawn once for every window

A window moves a weight by floor(d + U_h), whose mean is U_h: nothing is lost on average, and a whole window is less than one
integer off. A window of one step is stochastic rounding; long ones approach float32 masters. U_{k-1} is the sum of updates that
are computed again, from the coefficients of the steps and the noise at its addresses, one block at a time.

The method is that of Quantized Evolution Strategies (arXiv 2602.03120), with these differences. A window begins at a fixed step
and does not slide: in one that slides, a step computed again may round differently from how it was applied. Nothing decays:
with their factor of 0.9, an update that stays below 0.05 integers never moves a weight. A step beyond -127 or 127 is lost, as
with masters, and not kept for later, so that U does not depend on the weights and no past weight is needed.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from eggroll.noise.leaves import LeafPlan, PerturbedLeaf
from eggroll.update.blocks import Moves
from eggroll.update.history import History
from eggroll.update.precision import uniforms


@dataclasses.dataclass(frozen=True)
class Feedback:
    """Update int8 parameters without float32 masters or moments: the `precision` of an `EvolutionStrategy`.

    The optimizer's update of these parameters must be a function of the gradient alone, such as that of `optax.sgd` with a
    constant step size. Parameters in short floats are rounded stochastically.

    Args:
        window: h >= 1, steps that share a random offset d. An update computes (h + 1) / 2 estimates on average, without forward
            passes, and the state has h (P + 2) numbers.

    Raises:
        ValueError: the window is not an integer >= 1.
    """

    window: int = 16

    def __post_init__(self) -> None:
        if not (isinstance(self.window, int) and self.window >= 1):
            raise ValueError(f"window must be an integer >= 1, got {self.window!r}.")


class Remembered(NamedTuple):
    """State of an optimizer, and the steps that its updates can be computed again from."""

    history: History
    inner: Any


def remember(
    optimizer: optax.GradientTransformationExtraArgs, feedback: Feedback, *, num_pairs: int
) -> optax.GradientTransformationExtraArgs:
    """Add the history of the steps to the state of an optimizer.

    Args:
        optimizer: any.
        feedback: with the length of the history.
        num_pairs: P.
    """

    def init(params: Any) -> Remembered:
        return Remembered(History.before_first(feedback.window, num_pairs), optimizer.init(params))

    def update(updates: Any, state: Remembered, params: Any = None, **extra: Any) -> tuple[Any, Remembered]:
        moves, inner = optimizer.update(updates, state.inner, params, **extra)
        return moves, Remembered(_following(state.history, extra), inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _following(history: History, extra: Any) -> History:
    return history.after(extra["coefficients"], extra["noise"].generation, extra["sigma"])


def is_fed_back(leaf: LeafPlan, precision: Any) -> bool:
    """Whether the rounding errors of a parameter are carried to later steps."""
    return isinstance(precision, Feedback) and leaf.quantised and isinstance(leaf, PerturbedLeaf)


class Window(NamedTuple):
    """The window that an update belongs to."""

    history: History  # with the step of this update
    begun: Array  # int32 [], windows before it
    steps: Array  # int32 [], steps of the window taken so far, including this one

    @classmethod
    def of_update(cls, state: Remembered, extra: Any) -> "Window":
        """The window of the update that follows a state, from the extra arguments of the optimizer."""
        history, length = _following(state.history, extra), state.history.generations.shape[0]
        return cls(history, (history.steps - 1) // length, (history.steps - 1) % length + 1)

    def step(self, compute: Callable[[Array, Array, Array], tuple[Array, Array]], words: Array) -> Moves:
        """Compute the step of a block, in whole numbers.

        All updates, this one too, are computed by the same instructions, so that a past one has the bits that it had.

        Args:
            compute: from coefficients [P], noise generation and sigma of a step to its gradient and update.
            words: uint32, random, the same for all steps of the window; of the shape of the block.

        Returns:
            The gradient of this update and its step, float32.
        """
        past = (self.history.coefficients, self.history.generations, self.history.sigmas)

        def add(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            _, before, _ = carry
            gradient, update = compute(*jax.tree.map(lambda x: x[self.steps - 1 - index], past))
            return before, before + update, gradient

        begin = uniforms(words)
        before, after, gradient = jax.lax.fori_loop(0, self.steps, add, (begin, begin, jnp.zeros_like(begin)))
        return Moves(gradient, jnp.floor(after) - jnp.floor(before), ())
