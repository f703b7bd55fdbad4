"""Runnable front ends of the library; each module is one experiment, `python -m experiments.<name>`."""
