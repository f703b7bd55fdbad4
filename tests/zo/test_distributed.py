"""A mesh changes where a zeroth-order step runs, not what it does: the oracle is the resident run on one device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eggroll import zo
from eggroll.noise.plan import LeafPlan, Plan
from eggroll.noise.rules import Dense, LowRank
from eggroll.update.estimator import gradient
from eggroll.zo.offload.devices import part_of_gradient
from tests.zo.tiny_blocks import PIECES, init

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def over_meshes():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "zo" / "zo_mesh_runs.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_directions_signs_and_batches_over_devices_are_the_same_run(over_meshes):
    """20 steps, resident and offloaded: perturbation parallelism, of the two signs of one direction too, data parallelism with
    shares of different weight, both; replicas equal to the bit.
    """
    assert len(over_meshes["runs"]) == 6 * 1 + 2 * (5 + 1 + 2 + 2 + 1 + 1) + 1
    for name, row in over_meshes["runs"].items():
        assert row["params"] <= 5e-5 and row["losses"] <= 2e-5 and row["first_coefficients"] <= 2e-6, (name, row)
        assert row["replicas_equal"], (name, row)


@pytest.mark.slow
def test_a_block_lies_in_the_host_once_and_crosses_once(over_meshes):
    """In slices, not in copies; what a device gathers is the block, and nothing else crosses."""
    block = over_meshes["block"]
    assert block["host"] == block["stored"]
    assert block["crossing"] == {"all-gather": block["stored"] // 2}


@pytest.mark.slow
def test_what_cannot_be_spread_is_refused(over_meshes):
    words = {
        "axis": "blocks are offloaded over mesh axes population and data, got 'model'.",
        "forwards": "directions 1 can be shared by at most 2 devices; mesh axis 'population' has 4.",
        "examples": "in a multiple of the devices of mesh axis 'data', 3, got shape (4, 6).",
    }
    assert all(over_meshes["messages"][name].endswith(text) for name, text in words.items()), over_meshes["messages"]


@pytest.mark.parametrize("spec", [Dense("normal"), Dense("rademacher"), LowRank(2)])
def test_a_part_of_the_gradient_is_cut_out_of_the_whole(spec):
    """Every part draws its own dense noise only."""
    role = "low-rank" if isinstance(spec, LowRank) else "dense"
    axes = {"rows": (0,), "columns": (1,)} if role == "low-rank" else {}
    leaf = LeafPlan("w", (5, 33), jnp.dtype("float32"), role, spec, "", **axes)
    where = dict(noise_key=jax.random.key(3), noise_generation=jnp.int32(2), sigma=jnp.float32(0.1), first_index=1)
    d = jnp.array([0.5, -2.0, 1.0], jnp.float32)
    expected = np.ravel(gradient(Plan((leaf,), jax.tree.structure(0)), d, **where))
    for count in (192, 64):
        starts = range(0, 192, count)
        parts = [part_of_gradient(leaf, d, first=first, count=count, padded=192, **where) for first in starts]
        np.testing.assert_allclose(np.concatenate(parts)[: expected.size], expected, rtol=1e-6, atol=1e-6)


def test_blocks_of_any_shape_are_stored_and_come_back():
    away = zo.Offload(zo.mezo(PIECES, learning_rate=0.1))
    params = init()
    params["blocks"]["deep"] = jax.random.normal(jax.random.key(1), (4, 3, 5, 7))
    state = away.init(params, key=jax.random.key(0))
    assert state.blocks[0]["deep"].values.shape == (128,) and state.blocks[0]["deep"].shape == (3, 5, 7)
    jax.tree.map(np.testing.assert_array_equal, away.parameters(state), params)
