"""The scalars of the last steps: with the addressed noise, their estimates can be computed again at any time."""

from typing import NamedTuple, Self

import jax.numpy as jnp
from jax import Array


class History(NamedTuple):
    """The last h steps, newest first: h (n + 2) numbers, and how many steps there were."""

    steps: Array  # int32 [], number of steps taken
    coefficients: Array  # float32 [h, n]
    generations: Array  # int32 [h], of their noise
    sigmas: Array  # float32 [h]

    @classmethod
    def before_first(cls, length: int, coefficients: int) -> Self:
        """The history before the first step, of h steps with n coefficients each."""
        return cls(jnp.int32(0), jnp.zeros((length, coefficients)), jnp.zeros(length, jnp.int32), jnp.ones(length))

    def after(self, coefficients: Array, generation: Array, sigma: Array) -> "History":
        """The history with one more step [n], [], []; the oldest is forgotten."""
        push = lambda new, old: jnp.concatenate([jnp.asarray(new, old.dtype)[None], old[:-1]])  # noqa: E731
        new = push(coefficients, self.coefficients), push(generation, self.generations), push(sigma, self.sigmas)
        return History(self.steps + 1, *new)
