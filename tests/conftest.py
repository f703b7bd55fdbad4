"""Settings of every test: dtypes are never promoted silently, and warnings are errors (pyproject.toml)."""

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def standard_promotion():
    """Allow dtype promotion in one test, for third-party code that relies on it (`optax.adam` raises a float to an int32)."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def quick_compilation():
    """Compile without optimizations in one test, for programs that are too small to gain from them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
