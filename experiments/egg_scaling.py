"""`python -m eggroll.experiments.egg_scaling`: see `experiments.egg.suite`."""

from eggroll.experiments.egg.suite import main

if __name__ == "__main__":
    main()
