"""Updates from projected gradients: descent, rebuilt Adam moments, momentum in a subspace."""
