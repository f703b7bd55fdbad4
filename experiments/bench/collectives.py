"""Bytes that cross between devices, read from a compiled program."""

import collections
import functools
import math
import re

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_LINE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(?:-done)?\(")  # a "-start" returns its operands too
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*?^\}", flags=re.MULTILINE | re.DOTALL)
_CALLED = re.compile(r"\b(?:calls|to_apply|body|\w+_computations?)=\{?((?:%?[\w.-]+(?:, )?)+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


def collective_bytes(hlo: str) -> dict[str, int]:
    """Sum the sizes of the results of the collectives, as one device sees them.

    Args:
        hlo: `compiled.as_text()`.

    Returns:
        Kind -> bytes, for the kinds that occur. A collective in the body of a loop counts once.
    """
    total: dict[str, int] = {}
    for shapes, kind in _LINE.findall(hlo):
        total[kind] = total.get(kind, 0) + array_bytes(shapes)
    return total


def executed_collective_bytes(hlo: str) -> dict[str, int]:
    """`collective_bytes` with the body of a loop counted as often as it runs; once where the compiler does not know."""
    texts = computations(hlo)
    (entry,) = (found[2] for found in _COMPUTATION.finditer(hlo) if found[1])

    @functools.cache
    def of(name: str) -> collections.Counter:
        total = collections.Counter(collective_bytes(texts[name]))
        for line in texts[name].splitlines():
            trips = int(found[1]) if (found := _TRIPS.search(line)) else 1
            for called in called_computations(line):
                for kind, size in of(called).items() if called in texts else ():
                    total[kind] += trips * size
        return total

    return dict(of(entry))


def computations(hlo: str) -> dict[str, str]:
    """Return the text of every computation by name."""
    return {found[2]: found[0] for found in _COMPUTATION.finditer(hlo)}


def called_computations(line: str) -> list[str]:
    """Return the names of the computations that an instruction calls; of a loop its body alone."""
    return re.findall(r"[\w.-]+", " ".join(_CALLED.findall(line)))


def array_bytes(shapes: str) -> int:
    """Add up the bytes of the arrays that a text of HLO names."""
    return sum(map(_bytes, _ARRAY.findall(shapes)))


def largest_collective(hlo: str, kind: str) -> int:
    """Bytes of the largest array that a kind of collective returns; 0 if there is none."""
    lines = [shapes for shapes, name in _LINE.findall(hlo) if name == kind]
    return max((_bytes(array) for shapes in lines for array in _ARRAY.findall(shapes)), default=0)


def _bytes(array: tuple[str, str, str]) -> int:
    dtype, bits, sizes = array
    size = math.prod(int(n) for n in sizes.split(",") if n)
    return size if dtype == "pred" else size * int(bits) // 8
