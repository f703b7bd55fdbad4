"""Whether the memory can hold the model of a run, before any weight is read: `eggroll.zo.room`, in the words of the options."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from eggroll.experiments.common.mesh import parse_mesh
from eggroll.experiments.zo.config import BACKPROP, Config
from eggroll.llm import hf
from eggroll.llm.models.families import init_params
from eggroll.zo.offload.devices import Devices
from eggroll.zo.room import Need, check_room, devices_of, offloaded_need, resident_need

OF_ADAM = 4  # parameters, gradient and two moments


def check_capacity(config: Config, model: hf.Config) -> None:
    """Raise ValueError, with what is missing and what to change, where the memory cannot hold the model.

    Args:
        config: of the run.
        model: the sizes.
    """
    trains, dtype = not config.evaluate, jnp.dtype(config.dtype if config.model else "float32")
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes_of(model))
    mesh = parse_mesh(config.mesh) if trains and config.recipe != BACKPROP else None
    devices, is_long = devices_of(mesh), dtype.itemsize > 2
    shorter = ["--dtype bfloat16"] if config.model and is_long else []
    if trains and config.recipe == BACKPROP:
        size = dtype.itemsize * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
        need = Need("parameters, gradient and moments of adam", OF_ADAM * size)
        check_room(need, devices, ["a recipe other than adam", *shorter])
    elif trains and config.offload:
        need = offloaded_need(params, Devices(mesh).mesh, transfer_dtype=config.transfer_dtype)
        transferred = ["--transfer-dtype bfloat16"] if is_long and config.transfer_dtype is None else []
        check_room(need, devices, [*transferred, *shorter])
    else:
        need = resident_need(params, devices, masters=[trains and not is_long] * len(jax.tree.leaves(params)))
        fewer = ["a mesh of fewer devices"] if len(devices) > 1 and devices[0].platform == "cpu" else []
        check_room(need, devices, [*fewer, "--offload"] if trains else shorter)


def shapes_of(model: hf.Config) -> Any:
    """The parameters of a model as shapes."""
    return jax.eval_shape(lambda: init_params(model, key=jax.random.key(0)))
