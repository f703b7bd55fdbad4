"""Recipes and seeds at equal forward budget, with backprop as the ceiling: `python -m experiments.zo_suite --help`."""
