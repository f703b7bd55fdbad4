"""Evolving reinforcement-learning policies: `python -m experiments.rl --help`."""
