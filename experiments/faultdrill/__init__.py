"""A training run is killed at random moments and resumed, bit for bit."""
