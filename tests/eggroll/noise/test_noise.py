"""The address contract: golden bits, the same bits however they are drawn, independence of leaves, pairs and generations."""

import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32

from eggroll.noise import addresses

PATHS = ["params/Dense_0/kernel", "params/Dense_1/kernel"]


def words(seed=0, generation=0, pair=0, path=PATHS[0], stack=(), count=8):
    key = addresses.leaf_keys(jax.random.key(seed), generation, [path])
    return addresses.draw_words(addresses.address_keys(key, pair, [stack]), [count])[0]


def test_golden_words():
    """A change of these bits makes every journal and every seed of users unreadable."""
    golden = {
        (0, 0, 0): [3637782390, 3049090371, 3048284752],
        (3, 5, 7): [856518829, 3056297227, 3836413704],
    }
    for (seed, generation, pair), expected in golden.items():
        assert words(seed, generation, pair, count=3).tolist() == expected
    assert words(3, 5, 7, stack=(2, 3), count=2)[1, 2].tolist() == [2740330042, 2274078670]


def test_words_follow_the_written_recipe():
    """The address chain of eggroll/addresses.py, written again with JAX's public threefry."""

    def mix(key, high, low):
        return threefry_2x32(key, jnp.array([high, low], jnp.uint32))

    digest = hashlib.sha256(PATHS[0].encode()).digest()
    key = mix(jax.random.key_data(jax.random.key(3)), 0, 5)
    key = mix(key, int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:8], "big"))
    key = mix(key, 7, 2)  # pair 7, stack index 2
    expected = jnp.concatenate([mix(key, 0, 0), mix(key, 0, 1)])
    np.testing.assert_array_equal(words(3, 5, 7, stack=(4,), count=4)[2], expected)


@pytest.mark.optimized
def test_same_bits_alone_vmapped_scanned_jitted_and_together():
    alone = jnp.stack([words(pair=p) for p in range(6)])
    np.testing.assert_array_equal(jax.vmap(lambda p: words(pair=p))(jnp.arange(6)), alone)
    np.testing.assert_array_equal(jax.lax.scan(lambda c, p: (c, words(pair=p)), None, jnp.arange(6))[1], alone)
    np.testing.assert_array_equal(jax.lax.map(lambda p: words(pair=p), jnp.arange(6), batch_size=4), alone)
    np.testing.assert_array_equal(jax.jit(words)(pair=3), alone[3])
    keys = addresses.leaf_keys(jax.random.key(0), 0, PATHS)
    together = addresses.draw_words(addresses.address_keys(keys, 3, [(), (2,)]), [8, 5])
    np.testing.assert_array_equal(together[0], alone[3])


def test_stack_index_addresses_one_layer():
    stacked = words(stack=(4,), count=6)
    longer = words(stack=(9,), count=6)
    np.testing.assert_array_equal(stacked, longer[:4])
    np.testing.assert_array_equal(words(count=6), longer[0])


def test_more_values_extend_fewer():
    np.testing.assert_array_equal(words(count=5), words(count=50)[:5])


def test_seed_zero_is_a_seed():
    assert words(0).tolist() != words(1).tolist()
    assert len(set(words(0).tolist())) == 8


@pytest.mark.parametrize("distribution", addresses.DISTRIBUTIONS)
def test_values_have_zero_mean_unit_variance_and_are_uncorrelated(distribution):
    n = 1 << 16
    drawn = addresses.decode(words(count=n), n, distribution=distribution, dtype=jnp.float32)
    z_mean = float(drawn.mean()) * n**0.5
    fourth = {"normal": 3.0, "rademacher": 1.0}[distribution]
    assert abs(z_mean) < 5
    assert abs(float((drawn**2).mean()) - 1) <= 5 * ((fourth - 1) / n) ** 0.5 + 1e-6
    assert abs(float((drawn[1:] * drawn[:-1]).mean())) * n**0.5 < 5
    if distribution == "normal":
        assert abs(float((drawn**4).mean()) - 3) < 5 * (96 / n) ** 0.5  # var of z^4 is 105 - 9


def correlation_z(first, second):
    """z-score of the sample correlation of two independent standard samples."""
    return float((first * second).mean()) * first.size**0.5


def test_leaves_pairs_layers_and_generations_are_independent():
    def values(**address):
        return addresses.decode(words(count=1 << 14, **address), 1 << 14, distribution="normal", dtype=jnp.float32)

    base = values()
    others = [values(path=PATHS[1]), values(pair=1), values(generation=1), values(seed=1), values(pair=1, generation=1)]
    assert all(abs(correlation_z(base, other)) < 5 for other in others)
    assert abs(correlation_z(base, values())) > 50  # control: shared noise is seen


def test_bfloat16_values_are_the_rounded_float32_values():
    own = words(count=100)
    wide = addresses.decode(own, 100, distribution="normal", dtype=jnp.float32)
    short = addresses.decode(own, 100, distribution="normal", dtype=jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(wide.astype(jnp.bfloat16)), np.asarray(short))


@pytest.mark.parametrize("distribution", addresses.DISTRIBUTIONS)
@pytest.mark.parametrize("m", [3, 16], ids=["in one word", "in words of its own"])
def test_factors_split_left_first(distribution, m):
    count = 2 * (m + 5)
    own = words(count=addresses.words_needed(count, distribution))
    factors = addresses.decode_factors(own, rank=2, m=m, n=5, distribution=distribution, dtype=jnp.float32)
    left, right = factors.unpack(jnp.float32)
    flat = addresses.decode(own, count, distribution=distribution, dtype=jnp.float32)
    np.testing.assert_array_equal(jnp.concatenate([left.reshape(-1), right.reshape(-1)]), flat)
    assert left.shape == (2, m) and right.shape == (2, 5)


@pytest.mark.parametrize("m", [3, 64], ids=["decoded, then turned", "turned, then decoded"])
def test_factors_as_matrices_sum_the_pairs(m):
    draw = functools.partial(words, stack=(2,), count=addresses.words_needed(2 * (m + 5), "rademacher"))
    own = jax.vmap(lambda pair: draw(pair=pair))(jnp.arange(3))
    factors = addresses.decode_factors(own, rank=2, m=m, n=5, distribution="rademacher", dtype=jnp.float32)
    expected = jnp.einsum("psrm,psrn->smn", *factors.unpack(jnp.float32))
    np.testing.assert_array_equal(jnp.matmul(*factors.as_matrices(jnp.float32)), expected)


def test_other_backends_draw_the_same_words(monkeypatch):
    mix, operands = addresses._mix.__wrapped__, jnp.arange(20, dtype=jnp.uint32).reshape(4, 5)
    here = mix(*operands)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    np.testing.assert_array_equal(mix(*operands), here)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (jnp.zeros(2, jnp.uint32), "typed key"),
        (7, "got int"),
        (jax.random.key(0, impl="rbg"), "threefry2x32"),
        (jax.random.split(jax.random.key(0)), "single key"),
    ],
)
def test_wrong_key_is_refused(key, message):
    with pytest.raises(TypeError, match=message):
        addresses.check_key(key)
