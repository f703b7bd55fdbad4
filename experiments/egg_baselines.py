"""`python -m experiments.egg_baselines`: see `experiments.egg.baselines`."""

from eggroll.experiments.egg.baselines import main

if __name__ == "__main__":
    main()
