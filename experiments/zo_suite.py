"""`python -m eggroll.experiments.zo_suite`: see `experiments.zo.suite`."""

from eggroll.experiments.zo.suite import main

if __name__ == "__main__":
    main()
