"""Policy networks: dense, convolutional, recurrent, and what is asked of a network of the user's.

A network is a Flax module that is made with `outputs=n`. It reads one observation in its own shape, of one agent with
`envs.PerAgent`, and returns [outputs]. A recurrent one has a method `initial_memory()` and is called
`network(memory, observation) -> (memory, outputs)`.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from eggroll import envs
from eggroll.envs.checks import check_recurrent, describe_error

SMALL_IMAGE = 10  # the longer side from which no convolution halves an image


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
        """Map an observation of any shape, float32, to [outputs]."""
        x = x.reshape(-1)
        for size in self.hidden_sizes:
            x = activate(nn.Dense(size)(x), self.activation)
        return nn.Dense(self.outputs)(x)


class CNN(nn.Module):
    """Convolutions of 3x3 with `channels` outputs, then the dense layers of `MLP`.

    One convolution keeps the size of a small image; a larger one is halved by each until its longer side is at most 10. They
    are written as products with patches, whose low-rank perturbation costs less on a CPU than that of a convolution.
    """

    hidden_sizes: Sequence[int]
    outputs: int
    activation: str = "tanh"
    channels: int = 16

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map an image [height, width, channels], float32, to [outputs]."""
        halve = max(x.shape[:2]) > SMALL_IMAGE
        while True:
            x = activate(nn.Dense(self.channels)(patches(x, stride=2 if halve else 1)), self.activation)
            if max(x.shape[:2]) <= SMALL_IMAGE:
                return MLP(self.hidden_sizes, self.outputs, self.activation)(x)


class GRU(nn.Module):
    """Dense layers, of which the last is a gated recurrent unit, then a linear layer."""

    hidden_sizes: Sequence[int]
    outputs: int
    activation: str = "tanh"

    def initial_memory(self) -> Array:
        """Return what is remembered before the first step, float32 [last hidden size]."""
        return jnp.zeros(self.hidden_sizes[-1], jnp.float32)

    @nn.compact
    def __call__(self, memory: Array, x: Array) -> tuple[Array, Array]:
        """Map memory and an observation of any shape to the new memory and [outputs]."""
        x = x.reshape(-1)
        for size in self.hidden_sizes[:-1]:
            x = activate(nn.Dense(size)(x), self.activation)
        memory, x = nn.GRUCell(self.hidden_sizes[-1])(memory, x)
        return memory, nn.Dense(self.outputs)(x)


def activate(x: Array, activation: str) -> Array:
    """Apply an activation of `MLP`."""
    return nn.tanh(x) if activation == "tanh" else nn.relu(nn.LayerNorm(use_bias=False, use_scale=False)(x))


def patches(image: Array, *, stride: int) -> Array:
    """Return the 3x3 patch around every `stride`-th pixel, [rows, columns, 9 channels], zeros outside the image."""
    height, width, _ = image.shape
    padded = jnp.pad(image, ((1, 1), (1, 1), (0, 0)))
    shifted = [padded[i : i + height : stride, j : j + width : stride] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifted, axis=-1)


def is_image(environment: envs.Environment) -> bool:
    """Return whether an agent sees an image, [height, width, channels]."""
    return len(_seen(environment).shape) == 3


def initial_memory(network: Any, environment: envs.Environment) -> Any:
    """Return what a recurrent network remembers before the first step, for every agent; None: it has no memory."""
    if not hasattr(network, "initial_memory"):
        return None
    space, memory = environment.action_space, network.initial_memory()
    if not isinstance(space, envs.PerAgent):
        return memory
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (space.agents, *jnp.shape(x))), memory)


def init_network(network: Any, environment: envs.Environment, *, key: Array) -> Any:
    """Draw initial parameters; `key` is consumed."""
    return network.init(key, *_arguments(network, environment))


def check_network(name: str, network: Any, environment: envs.Environment, *, outputs: int) -> None:
    """Raise TypeError or ValueError, naming the network, unless it reads the environment's observations as it should."""
    if not isinstance(network, nn.Module):
        raise TypeError(f"network {name} must be a flax.linen.Module, got {type(network).__name__}.")
    about, seen = f"network {name} in env '{environment.name}'", _seen(environment)
    _check_memory(about, network)
    try:
        params = jax.eval_shape(lambda key: init_network(network, environment, key=key), jax.random.key(0))
        made = jax.eval_shape(lambda params: network.apply(params, *_arguments(network, environment)), params)
    except Exception as error:  # the user's code, and whatever libraries it calls
        words = " ".join(str(error).split())[:500]
        raise ValueError(
            f"{about} cannot read observations float32{list(seen.shape)}: {type(error).__name__}: {words}"
        ) from error
    if hasattr(network, "initial_memory"):
        try:
            check_recurrent(network.initial_memory(), made)
        except ValueError as error:
            raise ValueError(f"{about}: {error}") from None
        made = made[1]
    if getattr(made, "shape", None) != (outputs,) or not jnp.issubdtype(made.dtype, jnp.floating):
        got = f"{made.dtype}{list(made.shape)}" if hasattr(made, "shape") else f"a {type(made).__name__}"
        raise ValueError(f"{about} must return float32[{outputs}] for one observation, got {got}.")


def _check_memory(about: str, network: Any) -> None:
    try:
        memory = network.initial_memory() if hasattr(network, "initial_memory") else ()
    except Exception as error:  # the user's code
        raise ValueError(f"{about}: {describe_error('initial_memory', error)}") from error
    if memory is None:
        raise ValueError(f"{about}: initial_memory() must return arrays; a network without a memory has no such method.")


def _seen(environment: envs.Environment) -> Array:
    """An observation of one agent, zeros."""
    shape = environment.observation_shape
    return jnp.zeros(shape[1:] if isinstance(environment.action_space, envs.PerAgent) else shape, jnp.float32)


def _arguments(network: Any, environment: envs.Environment) -> tuple[Any, ...]:
    memory = (network.initial_memory(),) if hasattr(network, "initial_memory") else ()
    return *memory, _seen(environment)
