"""Memory of zeroth-order steps as the compiler plans it, from shapes alone: nothing is allocated, nothing runs.

    ratio = (largest of a step's programs - plain forward) / parameters

in bytes of temporaries, and of results that do not lie in the memory of donated arguments.

Resident programs are the losses of a step and its update; offloaded ones update the resident parameters, begin, update a block,
send the streams through it, and end. The models read texts whose answers are single tokens: logits at the last position. Where
JAX has two devices, MeZO is also planned on meshes that share the signs of a direction ("population") or the texts ("data");
bytes are those of one device.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from eggroll import generation, zo
from eggroll.devices.mesh import update_shardings
from eggroll.experiments.bench.kernel_generation import ONE_BILLION, SMALL
from eggroll.experiments.bench.memory.programs import tree_bytes, usage
from eggroll.experiments.bench.offload.model import placed, step_of
from eggroll.experiments.bench.offload.programs import programs_of
from eggroll.llm.models.leaves import init
from eggroll.llm.models.transformer import TransformerConfig, leaves, make_decoder
from eggroll.noise.rules import Dense

SIZES = {
    "smollm2": TransformerConfig(49152, 576, 1536, 30, 9, 3, 64, model_type="llama", tie_word_embeddings=True),
    "1b": ONE_BILLION,
    "tiny": SMALL,
}
BATCH, TOKENS = 16, 64
RESIDENT = ("mezo", "adamezo", "lozo", "lozo_m")  # recipes that are planned
SHARED = ("population", "data")  # what MeZO's two devices of a mesh share


def memory_summary(names: tuple[str, ...]) -> dict[str, Any]:
    """Print a row for every size; return `sizes`, and the worst of every ratio."""
    kinds = (*RESIDENT, "offload", *(SHARED if jax.device_count() > 1 else ()))
    titles = "".join(f"{title:>14}" for title in ("parameters MB", "plain MB", *kinds, "two blocks"))
    print(f"{'float32 model':<14}{titles}", flush=True)
    sizes = {}
    for name in names:
        sizes[name] = row = memory_row(SIZES[name])
        megabytes = "".join(f"{row[key] / 1e6:>14.0f}" for key in ("parameter_bytes", "plain_bytes"))
        ratios = "".join(f"{row[key]:>14.3f}" for key in ratio_names((*kinds, "two_blocks")))
        print(f"{name:<14}{megabytes}{ratios}", flush=True)
    worst = {key: max(row[key] for row in sizes.values()) for key in ratio_names(kinds)}
    return worst | {"sizes": sizes, "batch": [BATCH, TOKENS]}


def ratio_names(kinds: Iterable[str]) -> list[str]:
    """The keys of the ratios of these kinds of steps."""
    return [f"{kind}_ratio" for kind in kinds]


def memory_row(config: TransformerConfig) -> dict[str, Any]:
    """Compile the programs of the resident recipes, and of offloaded MeZO, of a decoder."""
    params = jax.eval_shape(functools.partial(init, leaves(config), dtype=jnp.float32), jax.random.key(0))
    batch = jax.ShapeDtypeStruct((BATCH, TOKENS), jnp.int32), jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    return planned(decoder_pieces(config), params, batch)


def planned(pieces: zo.Blocks, params: Any, batch: Any) -> dict[str, Any]:
    """Return what the compiler plans for a model in pieces; ratios are over the parameters' bytes.

    Args:
        pieces: the model.
        params: shapes.
        batch: shapes.
    """
    size, blocks = tree_bytes(params), jax.tree.leaves(params["blocks"])
    key = jax.eval_shape(lambda: jax.random.key(0))
    plain = _planned_bytes(jax.jit(zo.blocks.whole_loss(pieces)).lower(params, batch, key))
    tuners = {name: zo.RECIPES[name](pieces, learning_rate=1e-6) for name in RESIDENT}
    tuners["mezo"] = dataclasses.replace(tuners["mezo"], perturbation=Dense("normal"))  # which takes more than signs
    lowered = {name: resident_programs(tuner, params, batch) for name, tuner in tuners.items()}
    away = programs_of(step_of(zo.Offload(tuners["mezo"]), params, batch))
    lowered["offload"] = {name: function.lower(*shapes) for name, (function, shapes) in away.items()}
    for axis in SHARED if jax.device_count() > 1 else ():
        mesh = Mesh(np.array(jax.devices()[:2]), (axis,))
        lowered[axis] = resident_programs(dataclasses.replace(tuners["mezo"], mesh=mesh), params, batch)
    found = {name: {step: _planned_bytes(one) for step, one in programs.items()} for name, programs in lowered.items()}
    row: dict[str, Any] = {f"{name}_ratio": (max(own.values()) - plain) / size for name, own in found.items()}
    two_blocks = 2 * tree_bytes(blocks) / blocks[0].shape[0]
    return row | {"two_blocks_ratio": two_blocks / size, "parameter_bytes": size, "plain_bytes": plain, "programs": found}


def decoder_pieces(config: TransformerConfig) -> zo.Blocks:
    """A decoder whose loss is the mean of -log p of a token after a text; batch (int32 [B, T], int32 [B])."""
    decoder = make_decoder(config)

    def begin(resident: Any, batch: Any, key: jax.Array) -> Any:
        return decoder.begin(resident, batch[0], jnp.ones(batch[0].shape, bool))

    def end(resident: Any, x: jax.Array, batch: Any) -> jax.Array:
        logits = decoder.logits(resident, x[:, -1:])[:, 0]
        chosen = jnp.take_along_axis(logits, batch[1][:, None], axis=-1)[:, 0]
        return (jax.nn.logsumexp(logits, axis=-1) - chosen).mean()

    return zo.Blocks(begin, decoder.block, end)


def resident_programs(tuner: zo.ZerothOrder, params: Any, batch: Any) -> dict[str, Any]:
    """Lower the two programs of a resident step."""
    plan, placement = tuner.plan_of(params, batch), tuner.placement
    state = jax.eval_shape(lambda params: tuner.init(params, key=jax.random.key(0)), params)
    coefficients = jax.ShapeDtypeStruct((tuner.directions,), jnp.float32)
    shardings = update_shardings(placement, state)
    if placement is not None:
        state = jax.tree.map(_put, state, shardings[0])
        coefficients = _put(coefficients, placement.replicated)
        batch = placed(batch, placement.mesh, placement.batch_spec(split=True, padded=False))
    settings: dict[str, Any] = {"optimizer": tuner.optax_optimizer(plan), "shardings": shardings and shardings[0]}
    update: Callable = functools.partial(generation.update_parameters, tuner, plan, **settings)
    return {
        "score": jax.jit(functools.partial(tuner.score, plan)).lower(state, batch),
        "update": jax.jit(update, donate_argnums=0, out_shardings=shardings).lower(state, coefficients),
    }


def _put(shape: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def _planned_bytes(lowered: Any) -> int:
    """Temporaries, and results that take memory of their own."""
    found = usage(lowered.compile())
    return found.temporaries + found.results - found.aliases
