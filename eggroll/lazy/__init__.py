"""Lazy perturbed values: a model runs with W + sigma E without the sum being built; how its use of a parameter is read."""
