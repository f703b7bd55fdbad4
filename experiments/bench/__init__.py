"""Benchmarks: ratios measured in one process, the forms interleaved."""
