"""Byte corpora and the entropies they are compared with."""
