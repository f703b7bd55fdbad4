"""The product of an activation with noise that differs in the signs of its rows and columns."""
