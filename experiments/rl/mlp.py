"""A multilayer perceptron in Flax."""

from collections.abc import Sequence

import flax.linen as nn
from jax import Array

ACTIVATIONS = ("tanh", "relu_layer_norm")


class MLP(nn.Module):
    """Dense layers with an activation between them.

    Args:
        hidden_sizes: widths of the hidden layers.
        outputs: width of the last layer, which is linear.
        activation: "tanh", or "relu_layer_norm": relu of the layer norm without parameters, as the policies of the EGGROLL
            paper (arXiv 2511.16652, appendix N.4).
    """

    hidden_sizes: Sequence[int]
    outputs: int
    activation: str = "tanh"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map [*batch, features] to [*batch, outputs]."""
        for size in self.hidden_sizes:
            x = nn.Dense(size)(x)
            x = nn.tanh(x) if self.activation == "tanh" else nn.relu(nn.LayerNorm(use_bias=False, use_scale=False)(x))
        return nn.Dense(self.outputs)(x)
