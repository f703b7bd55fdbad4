"""Whether the memory can hold the model of a run, before any weight is read: `eggroll.zo.room`, in the words of the options."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from eggroll.experiments.common.mesh import parse_mesh
from eggroll.experiments.zo.config import BACKPROP, Config
from eggroll.llm import hf
from eggroll.llm.models.families import init_params
from eggroll.zo.offload.devices import Devices
from eggroll.zo.room import Need, check_room, devices_of, offloaded_need, resident_need

OF_ADAM = 16  # bytes a parameter: it, its gradient and two moments; short: a float32 copy, two moments, itself and its gradient


def check_capacity(config: Config, model: hf.Config) -> None:
    """Raise ValueError, with what is missing and what to change, where the memory cannot hold the model.

    Args:
        config: of the run.
        model: the sizes.
    """
    trains, by_block, dtype = not config.evaluate, config.offload, dtype_of(config)
    params = shapes_of(config, model)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    size = dtype.itemsize * count
    mesh = parse_mesh(config.mesh) if (trains or by_block) and config.recipe != BACKPROP else None
    devices, is_long = devices_of(mesh), dtype.itemsize > 2
    shorter = ["--dtype bfloat16"] if config.model and is_long else []
    if trains and config.recipe == BACKPROP:
        check_room(Need("parameters, gradient and moments of adam", OF_ADAM * count), devices, ["a recipe other than adam"])
    elif by_block:
        need = offloaded_need(params, Devices(mesh).mesh, transfer_dtype=config.transfer_dtype)
        transferred = ["--transfer-dtype bfloat16"] if is_long and config.transfer_dtype is None else []
        check_room(need._replace(read=size), devices, [*transferred, *shorter])
    else:
        copied = trains and not is_long and config.precision in (None, "master")
        need = resident_need(params, devices, masters=[copied] * len(jax.tree.leaves(params)))
        check_room(need, devices, _fewer_bytes(devices, shorter, copied=copied) if trains else shorter)


def _fewer_bytes(devices: Sequence[Any], shorter: Sequence[str], *, copied: bool) -> list[str]:
    """What needs less than to hold all parameters, and float32 copies of them if they are `copied`, on every device."""
    on_cpu = devices[0].platform == "cpu"  # whose memory is the host's, too
    rounded = ["--precision stochastic"] if copied else [f"{option} --precision stochastic" for option in shorter]
    fewer = ["a mesh of fewer devices"] if on_cpu and len(devices) > 1 else []
    return [*fewer, *([] if on_cpu and not copied else ["--offload"]), *rounded]


def dtype_of(config: Config) -> Any:
    """The dtype of the parameters."""
    return jnp.dtype(config.dtype if config.model else "float32")


def shapes_of(config: Config, model: hf.Config) -> Any:
    """The parameters of a model as shapes."""
    shapes = jax.eval_shape(lambda: init_params(model, key=jax.random.key(0)))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype_of(config)), shapes)
