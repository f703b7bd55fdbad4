"""Integer-only pretraining of a recurrent language model: `python -m eggroll.experiments.egg --help`."""
