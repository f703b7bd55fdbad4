"""`python -m eggroll.experiments.egg_baselines`: see `experiments.egg.baseline_suite`."""

from eggroll.experiments.egg.baseline_suite import main

if __name__ == "__main__":
    main()
