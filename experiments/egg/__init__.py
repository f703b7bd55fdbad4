"""Integer-only pretraining of a recurrent language model: `python -m experiments.egg --help`."""
