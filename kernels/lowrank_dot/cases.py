"""Shapes of the low-rank product that tests and the benchmark share."""

from typing import NamedTuple

from eggroll.kernels.lowrank_dot.config import Config


class Case(NamedTuple):
    """One call: P pairs of R rows each, a matrix [m, n], noise of rank r in one form."""

    name: str
    pairs: int
    rows: int
    m: int
    n: int
    rank: int
    form: str  # "values", "int8", "words" or "keys"
    config: Config | None = None  # None: chosen


def _tested() -> list[Case]:
    two = [Config(64, 2), Config(128, 2, "before")]
    forms = ["values", "int8", "words", "keys"]
    return [
        *(Case(f"{form}-{config.hidden}", 64, 2, 128, 128, 1, form, config) for form in forms for config in two),
        Case("steps-in-turns", 32, 4, 256, 64, 1, "words", Config(64, 2)),  # more steps than buffers
        Case("int8-steps", 32, 4, 256, 64, 1, "int8", Config(64, 2)),
        Case("one-row-a-pair", 100, 1, 128, 64, 1, "values", Config(64, 2)),  # and pairs that are padded
        Case("rank-4-wide", 30, 8, 128, 256, 4, "keys", Config(256, 1)),
        Case("rank-16-in-chunks", 64, 2, 64, 128, 16, "keys", Config(64, 1, "before")),
        Case("rank-3-no-power-of-two", 16, 12, 128, 64, 3, "values", Config(64, 2)),
        Case("rank-3-padded-terms", 64, 2, 64, 64, 3, "words", Config(64, 1)),
        Case("rank-5-two-chunks", 64, 2, 64, 64, 5, "values", Config(64, 1, "before")),
        Case("long-rows", 3, 100, 128, 64, 2, "words", Config(64, 2)),
        Case("long-rows-before", 2, 200, 64, 64, 1, "values", Config(64, 1, "before")),
        Case("chosen", 64, 2, 128, 192, 2, "keys"),
    ]


TESTED = _tested()

# The paper's workload; the layers of a 7B decoder (hidden 3584, MLP 18944) at one token a member; prefill; a policy's MLP.
MEASURED = [
    *(Case(f"paper-{form}", 512, 2, 8192, 8192, 1, form) for form in ("values", "words", "keys")),
    *(Case(f"decode-{members}-up", members // 2, 2, 3584, 18944, 1, "keys") for members in (256, 1024, 8192)),
    *(Case(f"decode-{members}-down", members // 2, 2, 18944, 3584, 1, "keys") for members in (256, 1024, 8192)),
    *(Case(f"decode-{members}-square", members // 2, 2, 3584, 3584, 1, "keys") for members in (256, 1024, 8192)),
    Case("decode-1024-rank-4", 512, 2, 3584, 3584, 4, "keys"),
    Case("prefill-128-tokens", 32, 256, 3584, 3584, 1, "keys"),
    Case("policy-mlp", 2048, 16, 256, 256, 1, "keys"),
]
