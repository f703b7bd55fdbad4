"""A training run is killed at random moments, its files are damaged, and it is resumed, bit for bit."""
