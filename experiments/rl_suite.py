"""`python -m eggroll.experiments.rl_suite`: see `experiments.rl.suite`."""

from eggroll.experiments.rl.suite import main

if __name__ == "__main__":
    main()
