"""Zeroth-order fine-tuning on the perturbations of the engine; nothing is built yet."""
