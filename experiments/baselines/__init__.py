"""Algorithms that the evolution strategies are compared with, through the same environments and policies."""
