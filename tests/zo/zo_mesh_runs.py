"""Zeroth-order steps, resident and offloaded, over 1, 2 and 4 virtual devices.

`test_distributed.py` starts it and judges the JSON line that it prints.
"""

import json
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

import eggroll
from eggroll import zo
from eggroll.experiments.bench.collectives import collective_bytes
from tests.zo.tiny_blocks import BATCH, PIECES, init

jax.config.update("jax_numpy_dtype_promotion", "strict")


RATE = optax.linear_schedule(1e-3, 3e-2, 10)
STEPS = 20


def flat(tree):
    return np.concatenate([np.ravel(np.asarray(leaf, np.float32)) for leaf in jax.tree.leaves(tree)])


def run(on=None, *, offload=False, transfer_dtype=None, steps=STEPS, **options):
    """Losses and coefficients of every step, the parameters, whether replicas are equal to the bit, the first step's scale."""
    options = dict(learning_rate=RATE, sigma=1e-2, weight_decay=0.1, directions=4, mesh=on) | options
    tuner = zo.mezo(PIECES, **options)
    runner = zo.Offload(tuner, transfer_dtype=transfer_dtype) if offload else tuner
    state, seen, scale = runner.init(init(), key=jax.random.key(9)), [], 0.0
    for step in range(steps):
        state, metrics = runner.step(state, BATCH)
        if step == 0:
            pairs = np.asarray(metrics.fitness).reshape(-1, 2)
            scale = float(np.abs(metrics.coefficients).max() / np.abs(pairs[:, 0] - pairs[:, 1]).max())
        seen.append([-float(metrics.mean_fitness), *np.asarray(metrics.coefficients).tolist()])
    kept = state.resident if offload else state.params
    replicas = [[np.asarray(part.data).tobytes() for part in leaf.addressable_shards] for leaf in jax.tree.leaves(kept)]
    same = all(len(set(parts)) == 1 for parts in replicas)
    params = runner.parameters(state)
    return np.array(seen), flat(params), same, scale


def mesh(**sizes):
    return Mesh(np.array(jax.devices()[: int(np.prod(list(sizes.values())))]).reshape(*sizes.values()), tuple(sizes))


MESHES = {
    "population 2": mesh(population=2),
    "population 4": mesh(population=4),
    "data 2": mesh(data=2),
    "data 4": mesh(data=4),
    "population 2, data 2": mesh(population=2, data=2),
}
BOTH = MESHES["population 2, data 2"]
CASES = [
    ({}, MESHES),
    ({"estimator": "fzoo"}, {"both": BOTH}),
    ({"directions": 1}, {"population 2": mesh(population=2), "both, in the other order": mesh(data=2, population=2)}),
    ({"directions": 3}, {"population 2": mesh(population=2), "population 4": mesh(population=4)}),
    ({"estimator": "grzo", "perturbation": eggroll.Flipout(), "learning_rate": 1e-4}, {"population 2": mesh(population=2)}),
    ({"perturbation": eggroll.LowRank(2, "normal", refresh=3), "directions": 2}, {"both": BOTH}),
]
results = {}


def compare(name, found, alone):
    losses = np.abs(found[0][:, 0] - alone[0][:, 0]).max()
    # In units of a difference of losses, whose rounding is what the coefficients differ by: estimators scale it.
    coefficients = np.abs(found[0][0, 1:] - alone[0][0, 1:]).max() / alone[3]
    row = {"losses": losses, "params": np.abs(found[1] - alone[1]).max(), "first_coefficients": coefficients}
    results[name] = {key: float(value) for key, value in row.items()} | {"replicas_equal": found[2]}


for options, meshes in CASES:
    alone = run(None, **options)
    for name, on in {"one device": None, **meshes}.items():
        for offload in (False, True):
            if on is not None or offload:
                found = run(on, offload=offload, **options)
                compare(f"{options}, {name}, {'offloaded' if offload else 'resident'}", found, alone)

short = dict(offload=True, transfer_dtype="bfloat16", steps=3)
compare("bfloat16 on the way, both", run(BOTH, **short), run(None, **short))


def crossing():
    """Bytes in the host's memory of one copy and of all devices, and bytes of each collective in the program of one block."""
    away = zo.Offload(zo.mezo(PIECES, learning_rate=0.1, directions=4, mesh=BOTH))
    params = init(2)
    params["blocks"] |= {"w": jnp.ones((2, 8, 8)), "up": jnp.ones((2, 8, 8)), "bias": jnp.zeros((2, 8))}
    state = away.init(params, key=jax.random.key(0))
    leaves = jax.tree.leaves(state.blocks)
    host = sum(part.data.nbytes for leaf in leaves for part in leaf.addressable_shards)
    state, _ = away.step(state, BATCH)
    small, batch = state._replace(blocks=()), away.devices.batch(BATCH)
    carry, aux = away._cache["begin"](small, batch)
    on_device = jax.device_put(state.blocks[0], jax.tree.map(lambda x: x.sharding.with_memory_kind("device"), state.blocks[0]))
    hlo = away._cache["visit"].lower(small, on_device, jnp.int32(0), carry, aux).compile().as_text()
    return {"host": host, "stored": sum(leaf.nbytes for leaf in leaves), "crossing": collective_bytes(hlo)}


messages = {}
for name, make in {
    "axis": lambda: zo.Offload(zo.mezo(PIECES, learning_rate=0.1, mesh=mesh(model=2))),
    "forwards": lambda: zo.mezo(PIECES, learning_rate=0.1, mesh=mesh(population=4)),
    "examples": lambda: run(mesh(data=3), offload=True, steps=1),
}.items():
    try:
        make()
    except ValueError as error:
        messages[name] = str(error)
print(json.dumps({"runs": results, "block": crossing(), "messages": messages}))
