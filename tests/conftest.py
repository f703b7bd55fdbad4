"""Settings of every test: dtypes are never promoted silently, and warnings are errors (pyproject.toml)."""

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def standard_promotion():
    """Allow dtype promotion in one test, for third-party code that relies on it (`optax.adam` raises a float to an int32)."""
    with jax.numpy_dtype_promotion("standard"):
        yield
