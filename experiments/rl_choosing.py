"""`python -m eggroll.experiments.rl_choosing`: see `experiments.rl.choosing`."""

from eggroll.experiments.rl.choosing import main

if __name__ == "__main__":
    main()
