"""Memory of a step as the compiler plans it, and that its parts are the same however they are drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eggroll import zo
from eggroll.experiments.bench.memory import zeroth_order
from eggroll.lazy import dense
from eggroll.noise import leaves, regions
from eggroll.zo.offload import passes
from tests.zo import tiny_blocks


@pytest.fixture
def small_blocks(monkeypatch):
    """What is drawn and updated at a time is small next to a small model."""
    monkeypatch.setattr(leaves, "LATE", 1 << 12)
    monkeypatch.setattr(dense, "ROWS", 1 << 13)
    monkeypatch.setattr(regions, "LIMIT", 1 << 13)


def check_bounds(row):
    assert max(row["mezo_ratio"], row["adamezo_ratio"]) <= 1.0 and max(row["lozo_ratio"], row["lozo_m_ratio"]) <= 0.15
    assert row["offload_ratio"] <= row["two_blocks_ratio"]


@pytest.mark.slow
def test_planned_memory_of_a_stacked_model(small_blocks):
    width, layers, words = 128, 16, 4096
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)  # noqa: E731
    params = {"resident": {"embed": shape(words, width)}, "blocks": {"w": shape(layers, width, width)}}
    params["blocks"]["up"] = params["blocks"]["w"]
    pieces = zo.Blocks(
        lambda resident, batch, key: (resident["embed"][batch], ()),
        lambda own, x, aux: x + jnp.tanh(x @ own["w"]) @ own["up"],
        lambda resident, x, batch: jax.nn.logsumexp(jnp.einsum("td,vd->tv", x, resident["embed"]), axis=-1).mean(),
    )
    check_bounds(zeroth_order.planned(pieces, params, jax.ShapeDtypeStruct((8,), jnp.int32)))


@pytest.mark.slow
def test_offloaded_steps_in_parts_are_resident_steps(monkeypatch):
    """Large parameters are drawn late, in rows, and updated region by region and in place."""
    monkeypatch.setattr(leaves, "LATE", 1)
    monkeypatch.setattr(dense, "ROWS", 24)
    monkeypatch.setattr(regions, "LIMIT", 24)
    tuner = zo.mezo(tiny_blocks.PIECES, learning_rate=0.01, sigma=1e-2, directions=2)
    away, params = zo.Offload(tuner), tiny_blocks.init()
    resident, offloaded = tuner.init(params, key=jax.random.key(1)), away.init(params, key=jax.random.key(1))
    for _ in range(4):
        resident, offloaded = (own.step(state, tiny_blocks.BATCH)[0] for own, state in ((tuner, resident), (away, offloaded)))
    found = zip(jax.tree.leaves(resident.params), jax.tree.leaves(away.parameters(offloaded)), strict=True)
    for ours, theirs in found:
        np.testing.assert_allclose(ours, theirs, atol=5e-5)
    jax.block_until_ready(params)  # the caller's arrays were not consumed


def test_streams_of_a_chunk_replace_the_ones_before_them():
    """Activations of all streams exist once, in place, where directions are evaluated a few at a time."""
    away = zo.Offload(zo.mezo(tiny_blocks.PIECES, learning_rate=0.01, directions=33, chunk_directions=2))
    state = away.init(tiny_blocks.init(), key=jax.random.key(1))
    streams, batch = away._streams(state, tiny_blocks.BATCH), jnp.tile(tiny_blocks.BATCH, (8, 1))
    small, first = state._replace(blocks=()), passes._upload(state.blocks[0])
    carry, aux = jax.eval_shape(passes.program(streams, "begin"), small, batch)
    visit = passes.program(streams, "visit").lower(small, first, jnp.int32(0), carry, aux).compile()
    planned, streams_bytes = visit.memory_analysis(), carry[0].size * carry[0].dtype.itemsize
    assert planned.temp_size_in_bytes < streams_bytes / 2 and planned.alias_size_in_bytes >= streams_bytes


def test_vectors_of_stacked_blocks_have_dense_noise_under_low_rank():
    """Factors across the blocks, which a tall stack of vectors would get otherwise, do not follow the blocks."""
    pieces = zo.Blocks(
        lambda resident, batch, key: (batch * resident["scale"], ()),
        lambda own, x, aux: x * own["norm"],
        lambda resident, x, batch: jnp.mean(x**2),
    )
    params = {"resident": {"scale": jnp.ones(64)}, "blocks": {"norm": jnp.ones((30, 64))}}
    plan = zo.lozo(pieces, learning_rate=0.1).plan_of(params, jnp.ones((2, 64)))
    assert [leaf.role for leaf in plan.leaves] == ["dense", "dense"] and plan.leaves[0].stack == (0,)
