"""Array kernels of the engine: one folder per operation, `reference` being its specification in plain jnp."""

if __name__ == "kernels":
    from eggroll.checkout import alias

    alias("kernels")
