"""Improving a language model on verifiable rewards, forward only: `python -m eggroll.experiments.reason --help`."""
