"""Evolving reinforcement-learning policies: `python -m eggroll.experiments.rl --help`."""
