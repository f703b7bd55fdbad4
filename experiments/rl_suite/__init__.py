"""Several tasks, algorithms and seeds at equal budgets, compared: `python -m experiments.rl_suite --help`."""
