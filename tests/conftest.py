"""Settings of every test: dtypes are never promoted silently, and warnings are errors (pyproject.toml)."""

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
