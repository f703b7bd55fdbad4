"""Shapes of the integer product that tests and the benchmark share."""

from typing import NamedTuple

from eggroll.kernels.int8_dot.config import Config


class Case(NamedTuple):
    """One call: P pairs of R rows each, a matrix [m, n], factors of rank r."""

    name: str
    pairs: int
    rows: int
    m: int
    n: int
    rank: int
    bits: int = 8
    shift: int | None = None
    config: Config | None = None  # None: chosen


TESTED = [
    Case("totals", 64, 2, 128, 64, 1, config=Config(64, 1)),
    Case("steps", 32, 4, 384, 64, 1, config=Config(64, 2)),
    Case("rescaled", 20, 8, 256, 128, 4, bits=9, shift=12, config=Config(128, 2)),
    Case("long-rows", 3, 100, 128, 64, 1, config=Config(64, 1)),
    Case("no-bits", 64, 2, 128, 64, 1, bits=0, config=Config(64, 1)),
    Case("four-digits", 64, 2, 1152, 64, 1, config=Config(64, 2)),
    Case("chosen", 64, 2, 128, 128, 1),
]

MEASURED = [
    Case("egg-256-mlp", 8192, 2, 256, 1024, 1, shift=8),
    Case("large-1024", 512, 2, 8192, 8192, 1),
]
