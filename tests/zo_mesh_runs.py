"""Zeroth-order steps over 1, 2 and 4 virtual devices; `test_offload.py` starts it and judges the JSON line that it prints."""

import json
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
import optax
from jax.sharding import Mesh

import zo
from tests.tiny_blocks import BATCH, PIECES, init

jax.config.update("jax_numpy_dtype_promotion", "strict")


def run(on=None, **options):
    rate = optax.linear_schedule(1e-3, 3e-2, 10)
    options = dict(learning_rate=rate, sigma=1e-2, weight_decay=0.1, directions=4, mesh=on) | options
    tuner = zo.mezo(PIECES, **options)
    state, seen = tuner.init(init(), key=jax.random.key(9)), []
    for _ in range(20):
        state, metrics = tuner.step(state, BATCH)
        seen.append([-float(metrics.mean_fitness), *np.asarray(metrics.coefficients).tolist()])
    replicas = [[np.asarray(part.data).tobytes() for part in leaf.addressable_shards] for leaf in jax.tree.leaves(state.params)]
    same = all(len(set(parts)) == 1 for parts in replicas)
    return np.array(seen), np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.params)]), same


def mesh(**sizes):
    return Mesh(np.array(jax.devices()[: int(np.prod(list(sizes.values())))]).reshape(*sizes.values()), tuple(sizes))


MESHES = {
    "population 2": mesh(population=2),
    "population 4": mesh(population=4),
    "data 2": mesh(data=2),
    "data 4": mesh(data=4),
    "population 2, data 2": mesh(population=2, data=2),
}
results = {}
for estimator in ("two_point", "fzoo"):
    seen, params, _ = run(estimator=estimator)
    for name, on in MESHES.items():
        found, moved, same = run(on, estimator=estimator)
        row = {"losses": float(np.abs(found[:, 0] - seen[:, 0]).max()), "params": float(np.abs(moved - params).max())}
        row["first_coefficients"] = float(np.abs(found[0, 1:] - seen[0, 1:]).max())
        results[f"{estimator}, {name}"] = row | {"replicas_equal": same, "moved": float(np.abs(params).max())}
uneven = run(mesh(population=2), directions=3)
alone = run(None, directions=3)
results["uneven"] = {"params": float(np.abs(uneven[1] - alone[1]).max())}
print(json.dumps(results))
