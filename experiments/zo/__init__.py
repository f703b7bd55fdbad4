"""Zeroth-order fine-tuning: `python -m experiments.zo --help`."""
