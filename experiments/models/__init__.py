"""Plain models that the experiments evolve."""
