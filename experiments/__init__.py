"""Runnable front ends of the library; each module is one experiment, `python -m eggroll.experiments.<name>`."""

if __name__ == "experiments":
    from eggroll.checkout import alias

    alias("experiments")
