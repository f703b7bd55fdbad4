"""Adapters, one module per suite of environments."""
