"""Runs: the training loop, durable run folders, fitness from outside JAX, progress and plots."""
