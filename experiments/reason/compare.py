"""`python -m eggroll.experiments.reason.compare`: see `experiments.reason.suite`."""

from eggroll.experiments.reason.suite import main

if __name__ == "__main__":
    main()
