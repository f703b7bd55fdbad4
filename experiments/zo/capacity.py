"""Whether a run can hold its model, from shapes alone, before any weight is read.

    resident      a device: the parameters (adam: four times, with gradient and moments)
    offloaded     a device: the parameters outside the blocks and three blocks; the host: all blocks

A lower bound: activations and temporaries come on top (docs/zeroth_order.md#memory). Virtual devices of a CPU share its memory.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from eggroll.devices.chunking import free_bytes
from eggroll.experiments.common.mesh import parse_mesh
from eggroll.experiments.zo.config import BACKPROP, Config
from eggroll.llm import hf
from eggroll.llm.memory import format_bytes
from eggroll.llm.models.families import init_params

ON_DEVICE = 3  # blocks of an offloaded run
OF_ADAM = 4  # parameters, gradient and two moments


def check_capacity(config: Config, model: hf.Config) -> None:
    """Raise ValueError, with what is missing and what to change, where the memory cannot hold the model.

    Args:
        config: of the run.
        model: the sizes.
    """
    mesh = parse_mesh(config.mesh)
    devices = 1 if mesh is None or config.evaluate else mesh.size
    dtype = jnp.dtype(config.dtype if config.model else "float32")
    shapes = shapes_of(model)
    resident, blocks = (_bytes(shapes[part], dtype) for part in ("resident", "blocks"))
    layers = jax.tree.leaves(shapes["blocks"])[0].shape[0]
    device, host = resident + blocks, 0
    what = f"a device holds the parameters, {format_bytes(device)}"
    shorter = ["--dtype bfloat16"] if config.model and dtype.itemsize > 2 else []
    advice = ["--offload", *shorter]
    if config.recipe == BACKPROP and not config.evaluate:
        device, advice = OF_ADAM * device, ["a recipe other than adam", *shorter]
        what = f"adam holds parameters, gradient and moments, {format_bytes(device)}"
    elif config.offload and not config.evaluate:
        short = dtype if config.transfer_dtype is None else jnp.dtype(config.transfer_dtype)
        held = min(ON_DEVICE, layers)
        device, host = resident + held * (blocks // layers), _bytes(shapes["blocks"], short)
        what = f"a device holds what is outside the blocks and {held} blocks, {format_bytes(device)}"
        advice = ["--transfer-dtype bfloat16"] if short.itemsize > 2 else []
    shared = jax.default_backend() == "cpu"
    needed, free = (devices * device + host if shared else device), free_bytes()
    if needed <= free:
        return
    if devices > 1:
        advice = ["a mesh of fewer devices", *advice] if shared else advice
        what += f", and the mesh has {devices} devices"
    what += f"; the host holds all blocks, {format_bytes(host)}" if host else ""
    tried = ", or ".join(advice or ["a smaller model"])
    short_of = f"{format_bytes(needed - free)} more than the {format_bytes(free)} that are free"
    raise ValueError(f"the model does not fit: {what}. That is {short_of}; try {tried}.")


def shapes_of(model: hf.Config) -> Any:
    """The parameters of a model as shapes."""
    return jax.eval_shape(lambda: init_params(model, key=jax.random.key(0)))


def _bytes(shapes: Any, dtype: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) * dtype.itemsize
