"""The plan as a table that people read."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from eggroll.rules import Integer, LowRank

if TYPE_CHECKING:
    from eggroll.plan import LeafPlan

HEADER = ("path", "shape", "role", "rank", "kernel", "bytes", "reason")


def table(leaves: Sequence["LeafPlan"]) -> str:
    """A line for every parameter, and the bytes of noise of one member."""
    rows = [HEADER, *map(_row, leaves)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    total = sum(leaf.noise_bytes for leaf in leaves)
    shared = sum(math.prod(leaf.shape) * leaf.noise_dtype.itemsize for leaf in leaves if leaf.role == "flipout")
    lines += [f"noise of all members: {shared:,} bytes"] if shared else []
    return "\n".join([*lines, f"noise per member: {total:,} bytes"])


def _row(leaf: "LeafPlan") -> tuple[str, ...]:
    rank = kernel = "-"
    if leaf.role == "low-rank" and isinstance(leaf.spec, LowRank | Integer):
        rank, kernel = str(leaf.spec.rank), leaf.implementation
    reason = f"{leaf.reason}, int8 quantised" if leaf.quantised else leaf.reason
    return leaf.path, str(leaf.shape), leaf.role, rank, kernel, f"{leaf.noise_bytes:,}", reason
