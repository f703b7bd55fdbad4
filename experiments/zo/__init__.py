"""Zeroth-order fine-tuning: `python -m eggroll.experiments.zo --help`."""
