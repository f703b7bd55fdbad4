"""Bias, cosine and variance of the gradient estimate on toy objectives; `python -m eggroll.experiments.estimator`."""
