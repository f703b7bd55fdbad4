"""Improving a language model on verifiable rewards, forward only: `python -m experiments.reason --help`."""
