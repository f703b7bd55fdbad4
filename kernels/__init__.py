"""Array kernels of the engine: one folder per operation, `reference` being its specification in plain jnp."""
