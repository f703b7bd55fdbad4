"""Noise: its addresses, how it is drawn, which parameter gets which (rules and plan)."""
