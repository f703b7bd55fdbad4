"""Shapes of the low-rank update that tests and the benchmark share."""

from typing import NamedTuple

from eggroll.kernels.lowrank_update.config import Config


class Case(NamedTuple):
    """One call: P pairs, a matrix [m, n], noise of rank r in one form."""

    name: str
    pairs: int
    m: int
    n: int
    rank: int
    form: str  # "values", "words" or "keys"
    config: Config | None = None  # None: chosen


TESTED = [
    Case("words", 192, 128, 64, 1, "words", Config(64, 2)),
    Case("keys-padded", 50, 128, 128, 3, "keys", Config(128, 2)),
    Case("values", 130, 128, 64, 2, "values", Config(64, 2)),
    Case("values-wide", 64, 256, 256, 1, "values", Config(256, 1)),
    Case("chosen", 64, 128, 192, 1, "keys"),
]

MEASURED = [
    *(Case(f"paper-{form}", 512, 8192, 8192, 1, form) for form in ("values", "words", "keys")),
    Case("up-8192", 4096, 3584, 18944, 1, "keys"),
    Case("square-1024", 512, 3584, 3584, 1, "keys"),
    Case("square-1024-rank-4", 512, 3584, 3584, 4, "keys"),
]
