"""Noise of regions: any cut of a parameter sees the noise of the whole, and no entry is left out or drawn twice."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eggroll.noise import draws, regions
from eggroll.noise.factored import FlipoutLeaf, LowRankLeaf
from eggroll.noise.leaves import DenseLeaf, FrozenLeaf
from eggroll.noise.plan import Plan
from eggroll.noise.rules import Dense, Flipout, Integer, LowRank
from tests.tables import by_default

KEY = jax.random.key(3)
LEAVES = {
    "stack": LowRankLeaf("a", (3, 70, 40), jnp.float32, LowRank(2), "", stack=(0,), rows=(1,), columns=(2,)),
    "normal": LowRankLeaf("a", (70, 41), jnp.float32, LowRank(3, "normal"), "", rows=(1,), columns=(0,)),
    "refreshed": LowRankLeaf("a", (70, 3, 130), jnp.float32, LowRank(refresh=2), "", stack=(1,), rows=(2,), columns=(0,)),
    "many axes": LowRankLeaf("a", (7, 5, 6, 9), jnp.float32, LowRank(3), "", rows=(2, 0), columns=(1, 3)),
    "integer": LowRankLeaf("a", (2, 37, 20), jnp.int8, Integer(2), "", stack=(0,), rows=(1,), columns=(2,)),
    "dense": DenseLeaf("d", (4, 50, 6), jnp.float32, Dense(), "", stack=(0,)),
    "dense signs": DenseLeaf("d", (50, 7), jnp.float32, Dense("rademacher"), ""),
    "flipout": FlipoutLeaf("f", (3, 30, 7), jnp.float32, Flipout(), "", stack=(0,), rows=(2,), columns=(1,)),
}


def noise_of(leaf, drawn):
    return drawn if isinstance(drawn, jax.Array) else draws.build_noise(leaf, drawn)


@functools.cache
def whole_noise(name):
    leaf = LEAVES[name]
    noise = noise_of(leaf, draws.draw([leaf], draws.leaf_keys([leaf], KEY, 5), 2)[0])
    shared = draws.draw_shared(Plan((leaf,), jax.tree.structure(0)), KEY, 5)[0]
    return np.asarray(noise), None if shared is None else np.asarray(shared)


def blocks_of(leaf, blocks):
    """Starts, noise and shared noise of all blocks, drawn in one program."""
    keys = draws.leaf_keys([leaf], KEY, 5)[0]

    def one(index):
        region = blocks.region(index)
        drawn = noise_of(regions.of_region(leaf, region), regions.draw_region(leaf, keys, 2, region))
        shared = regions.draw_shared_region(leaf, KEY, 5, region) if isinstance(leaf, FlipoutLeaf) else drawn
        return jnp.stack(region.starts), drawn, shared

    return jax.jit(lambda: jax.lax.map(one, jnp.arange(len(blocks))))()


@pytest.mark.parametrize("limit", by_default([900, 300, 64, 17], 300))
@pytest.mark.parametrize("name", list(LEAVES))
def test_a_region_has_the_noise_of_its_place(name, limit):
    leaf, (noise, shared) = LEAVES[name], whole_noise(name)
    seen = np.zeros(leaf.shape, int)
    for blocks in regions.cut(leaf, leaf.shape, limit=limit):
        assert math.prod(blocks.sizes) <= limit
        for starts, own, own_shared in zip(*blocks_of(leaf, blocks), strict=True):
            place = tuple(slice(int(start), int(start) + size) for start, size in zip(starts, blocks.sizes, strict=True))
            seen[place] += 1
            pairs = [(own, noise)] if shared is None else [(own, noise), (own_shared, shared)]
            for part, whole in pairs:  # programs may round erf_inv, and sums of products of normal factors, in their own way
                np.testing.assert_allclose(part, whole[place], rtol=1e-5 if "normal" in str(leaf.spec) else 0, atol=1e-6)
    assert (seen == 1).all()


def test_control_a_region_of_another_place_is_seen():
    leaf, (noise, _) = LEAVES["stack"], whole_noise("stack")
    keys = draws.leaf_keys([leaf], KEY, 5)[0]
    region = regions.Region((1, 2, 0), (1, 35, 40))
    drawn = np.asarray(noise_of(regions.of_region(leaf, region), regions.draw_region(leaf, keys, 2, region)))
    assert (drawn == noise[1:2, 2:37]).all() and not (drawn == noise[1:2, 1:36]).all()


@pytest.mark.parametrize("name", ["stack", "normal", "refreshed", "many axes"])
def test_factors_that_are_cut_make_the_product_of_their_place(name):
    leaf = LEAVES[name]
    stack, (m, n) = leaf.sizes(leaf.stack), leaf.matrix
    draw = np.random.default_rng(0).normal
    left, right = (jnp.asarray(draw(size=(3, *stack, 2, size))) for size in (m, n))

    def product(part, left, right):
        return draws.from_matrix(part, jnp.einsum("p...rm,p...rn->...mn", left, right, precision="highest"))

    whole = np.asarray(product(leaf, left, right))
    for blocks in regions.cut(leaf, leaf.shape, limit=300):
        index = len(blocks) - 1
        region = blocks.region(index)
        found = product(regions.of_region(leaf, region), *regions.cut_factors(leaf, left, right, region))
        place = tuple(slice(int(start), int(start) + size) for start, size in zip(*region, strict=True))
        np.testing.assert_allclose(found, whole[place], rtol=1e-5, atol=1e-6)
        assert index == 0 or not np.allclose(found, whole[tuple(slice(size) for size in region.sizes)], atol=1e-2)


def test_an_update_of_few_pairs_stays_in_the_caches_of_a_cpu(monkeypatch):
    assert regions.block_limit(1) == regions.CACHED < regions.block_limit(128) == regions.LIMIT
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert regions.block_limit(1) == regions.LIMIT


def test_an_embedding_is_cut_into_blocks_and_a_small_parameter_is_one():
    embedding = LowRankLeaf("e", (152_064, 3584), jnp.bfloat16, LowRank(), "", rows=(0,), columns=(1,))
    (blocks,) = regions.cut(embedding, embedding.shape)
    assert blocks.sizes[1] == 3584 and 2**21 < math.prod(blocks.sizes) <= regions.LIMIT
    head = LowRankLeaf("h", (3584, 152_064), jnp.bfloat16, LowRank(), "", rows=(0,), columns=(1,))
    assert [blocks.sizes[0] for blocks in regions.cut(head, head.shape)] == [3584]  # the longer side is cut
    prime = FrozenLeaf("p", (1_000_003, 64), jnp.float32, LowRank(), "")
    sizes = [blocks.sizes for blocks in regions.cut(prime, prime.shape)]
    assert sizes == [(65_536, 64), (1_000_003 % 65_536, 64)]
    assert [blocks.sizes for blocks in regions.cut(prime, (3, 5))] == [(3, 5)]
