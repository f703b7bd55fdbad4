"""Product of an activation with a low-rank perturbation."""
