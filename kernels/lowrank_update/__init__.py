"""Weighted sum of low-rank perturbations: the update of one matrix parameter."""
