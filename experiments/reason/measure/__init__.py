"""What is measured of a run: memory and settings before it, members next to the unperturbed model, the outcome after it."""
