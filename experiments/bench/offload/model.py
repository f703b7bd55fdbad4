"""OPT models and what a step of theirs takes on a mesh, all as shapes.

The loss is the mean over all tokens but the first of -log p(token | those before); parameters are bfloat16.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from eggroll import zo
from eggroll.llm.models.leaves import init
from eggroll.llm.models.opt import OPTConfig, leaves, make_decoder
from eggroll.noise.rules import Dense
from eggroll.zo.blocks import check_blocks
from eggroll.zo.offload.devices import AXES, BATCH, OWN, SAME, SLICES, Devices, Sliced
from eggroll.zo.offload.passes import program
from eggroll.zo.offload.streams import Streams

SIZES = {
    "175b": OPTConfig(50272, 12288, 96, 49152, 96, 2048, 12288),
    "13b": OPTConfig(50272, 5120, 40, 20480, 40, 2048, 5120),
    "tiny": OPTConfig(256, 64, 4, 256, 4, 64, 64),
}
MESHES = {1: (1, 1), 4: (2, 2)}  # devices -> "population", which the two signs share, and "data"


class Step(NamedTuple):
    """The programs of an offloaded step and the shapes of what they take."""

    streams: Streams
    state: Any  # without blocks
    block: Any  # a pytree of `Sliced`
    batch: Any  # int32 [B, T], a text for every device along "data"
    carry: Any  # of the streams between two blocks
    aux: Any
    num_blocks: int

    @property
    def index(self) -> Any:
        """Shape of the number of a block."""
        return jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(self.streams.devices.mesh, SAME))


def mesh_of(devices: list[Any]) -> Mesh:
    """Return the mesh of one or of four devices."""
    return Mesh(np.array(devices).reshape(MESHES[len(devices)]), AXES, axis_types=(AxisType.Auto,) * 2)


def make_step(config: OPTConfig, mesh: Mesh, *, tokens: int, recipe: str = "mezo") -> Step:
    """Make the step of an OPT model whose blocks are offloaded.

    Args:
        config: sizes of the model.
        mesh: of `mesh_of`; its devices need not be there.
        tokens: of every text; every device along "data" has one text.
        recipe: of `zo.RECIPES`.
    """
    options = {"perturbation": Dense("normal")} if recipe == "mezo" else {}  # which takes more than signs
    away = zo.Offload(zo.RECIPES[recipe](pieces_of(config), learning_rate=1e-6, mesh=mesh, **options))
    params = jax.eval_shape(functools.partial(init, leaves(config), dtype=jnp.bfloat16), jax.random.key(0))
    return step_of(away, params, jax.ShapeDtypeStruct((mesh.shape["data"], tokens), jnp.int32))


def step_of(away: zo.Offload, params: Any, batch: Any) -> Step:
    """Return the step of an offloaded model, from the shapes of its parameters and of a batch."""
    mesh = away.devices.mesh
    batch = placed(batch, mesh, BATCH if mesh.shape["data"] > 1 else SAME)
    streams = away.streams_of(away.tuner.plan_of(params, batch), params)
    state = jax.eval_shape(lambda resident: away.without_blocks(resident, jax.random.key(0)), params["resident"])
    state = placed(state, mesh, SAME)
    carry, aux = placed(jax.eval_shape(program(streams, "begin"), state, batch), mesh, OWN)
    block = jax.tree.map(functools.partial(_slices, devices=away.devices), params["blocks"])
    return Step(streams, state, block, batch, carry, aux, check_blocks(params))


def pieces_of(config: OPTConfig) -> zo.Blocks:
    """Return an OPT model in pieces."""
    decoder = make_decoder(config)

    def begin(resident: Any, batch: Array, key: Array) -> Any:
        return decoder.begin(resident, batch, jnp.ones(batch.shape, bool))

    def end(resident: Any, x: Array, batch: Array) -> Array:
        log_probabilities = jax.nn.log_softmax(decoder.logits(resident, x[:, :-1]).astype(jnp.float32))
        return -jnp.take_along_axis(log_probabilities, batch[:, 1:, None], axis=-1).mean()

    return zo.Blocks(begin, decoder.block, end)


def _slices(leaf: Any, *, devices: Devices) -> Sliced:
    """One leaf of one block as the device has it."""
    shape = leaf.shape[1:]
    count = devices.mesh.size * devices.slice_size(int(np.prod(shape)))
    values: Any = jax.ShapeDtypeStruct((count,), leaf.dtype, sharding=NamedSharding(devices.mesh, SLICES))
    return Sliced(values, shape, leaf.dtype)


def placed(tree: Any, mesh: Mesh, spec: PartitionSpec) -> Any:
    """Place every shape of a tree on a mesh."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)
