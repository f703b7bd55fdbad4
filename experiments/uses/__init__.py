"""A conformance table of the uses of parameters in JAX programs; `python -m eggroll.experiments.uses`."""
