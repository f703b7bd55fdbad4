"""What is computed once on CPU is equal, and XLA keeps it apart from what reads it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eggroll.noise.once import computed_once

VALUES = jnp.array([0.0, -0.0, 1.5, -1.2e-38, jnp.inf, jnp.nan, 3e38])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_values_are_equal_bit_for_bit(dtype):
    values = VALUES.astype(dtype)
    found = jax.jit(computed_once)(values)
    assert found.dtype == dtype
    np.testing.assert_array_equal(np.asarray(found).view(np.uint8), np.asarray(values).view(np.uint8))


def test_words_are_equal_and_integers_returned_as_they_are():
    words, integers = jnp.array([0, 1, 2**31, 2**32 - 1], jnp.uint32), jnp.arange(3)
    np.testing.assert_array_equal(jax.jit(computed_once)(words), words)
    assert computed_once(integers) is integers


@pytest.mark.optimized
def test_xla_does_not_repeat_it_for_every_reader():
    words = jnp.arange(256, dtype=jnp.uint32)

    def fusions(once):
        def program(words, x):
            decoded = (words & 1).astype(jnp.float32) * 2 - 1
            return jnp.tanh(x * (computed_once(decoded) if once else decoded))

        text = jax.jit(program).lower(words, jnp.ones((64, 256))).compile().as_text()
        return text[text.index("ENTRY") :].count(" fusion(")

    assert (fusions(once=False), fusions(once=True)) == (1, 2)
