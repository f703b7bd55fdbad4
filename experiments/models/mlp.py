"""A multilayer perceptron in Flax."""

from collections.abc import Sequence

import flax.linen as nn
from jax import Array


class MLP(nn.Module):
    """Dense layers with tanh between them.

    Args:
        hidden_sizes: widths of the hidden layers.
        outputs: width of the last layer, which is linear.
    """

    hidden_sizes: Sequence[int]
    outputs: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map [*batch, features] to [*batch, outputs]."""
        for size in self.hidden_sizes:
            x = nn.tanh(nn.Dense(size)(x))
        return nn.Dense(self.outputs)(x)
