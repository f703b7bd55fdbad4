"""Bytes that cross between devices, read from a compiled program."""

import math
import re

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_LINE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


def collective_bytes(hlo: str) -> dict[str, int]:
    """Sum the sizes of the results of the collectives, as one device sees them.

    Args:
        hlo: `compiled.as_text()`.

    Returns:
        Kind -> bytes, for the kinds that occur. A collective in the body of a loop counts once.
    """
    total: dict[str, int] = {}
    for shapes, kind in _LINE.findall(hlo):
        total[kind] = total.get(kind, 0) + sum(map(_bytes, _ARRAY.findall(shapes)))
    return total


def largest_collective(hlo: str, kind: str) -> int:
    """Bytes of the largest array that a kind of collective returns; 0 if there is none."""
    lines = [shapes for shapes, name in _LINE.findall(hlo) if name == kind]
    return max((_bytes(array) for shapes in lines for array in _ARRAY.findall(shapes)), default=0)


def _bytes(array: tuple[str, str, str]) -> int:
    dtype, bits, sizes = array
    size = math.prod(int(n) for n in sizes.split(",") if n)
    return size if dtype == "pred" else size * int(bits) // 8
