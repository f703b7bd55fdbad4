"""Moments of zeroth-order steps over 2 virtual devices; `test_moments.py` starts it and judges the JSON line that it prints."""

import json
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from jax.sharding import Mesh

import eggroll
from eggroll import zo
from tests.zo.tiny_blocks import BATCH, PIECES, init

jax.config.update("jax_numpy_dtype_promotion", "strict")

METHODS = {
    "adamezo": dict(adam=zo.RebuiltAdam(history=4), learning_rate=1e-3),
    "lozo_m": dict(momentum=0.9, learning_rate=3e-2, perturbation=eggroll.LowRank(2, "normal", refresh=5)),
}


def run(**options):
    tuner = zo.mezo(PIECES, sigma=1e-2, weight_decay=0.1, directions=4, **options)
    state = tuner.init(init(), key=jax.random.key(9), batch=BATCH)
    for _ in range(12):
        state, _ = tuner.step(state, BATCH)
    kept = jax.tree.leaves((state.params, state.opt_state))
    replicas = [[np.asarray(part.data).tobytes() for part in leaf.addressable_shards] for leaf in kept]
    same = all(len(set(parts)) == 1 for parts in replicas)
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.params)]), same


start = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(init())])
results = {}
for name, options in METHODS.items():
    alone, _ = run(**options)
    for axis in ("population", "data"):
        found, same = run(mesh=Mesh(np.array(jax.devices()), (axis,)), **options)
        row = {"params": float(np.abs(found - alone).max()), "moved": float(np.abs(found - start).max())}
        results[f"{name}, {axis}"] = row | {"replicas_equal": same}
print(json.dumps(results))
