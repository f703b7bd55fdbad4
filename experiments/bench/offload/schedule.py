"""What the compiled schedule of a loop over blocks computes while a block is copied.

XLA for GPUs writes the instructions of a computation in the order in which they are issued, an asynchronous copy as a `-start`
and a `-done`. Copies to or from the host's memory are those with one operand or result in memory space 5.
"""

import functools
import re
from typing import NamedTuple

from eggroll.experiments.bench.collectives import array_bytes, called_computations, computations

HOST = "S(5)"
_LINE = re.compile(r"^\s*(?:ROOT )?%([\w.-]+) = (.*?) ([\w-]+)\(([^)]*)\)(.*)$")
_PRODUCT = re.compile(r" (dot|convolution)\(|custom_call_target=\"[\w$]*(gemm|matmul|cudnn)")
MOVES_NOTHING = ("tuple", "get-tuple-element", "while", "parameter", "bitcast", "optimization-barrier", "conditional")


class Transfer(NamedTuple):
    """A copy in the body of a loop."""

    kind: str  # "upload", "download", "host copy" (the host's memory to itself), or "gather" (between devices)
    bytes: int  # that arrive
    products: int  # matrix products scheduled between its start and its end; 0 where it is not asynchronous


class _Instruction(NamedTuple):
    name: str
    result: str  # shapes
    operation: str
    operands: list[str]
    line: str


def block_transfers(hlo: str) -> list[Transfer]:
    """Return the copies in the body of the loop that holds most matrix products.

    Args:
        hlo: `compiled.as_text()` of a scheduled module.

    Raises:
        ValueError: there is no loop with a product.
    """
    texts = computations(hlo)

    @functools.cache
    def products(name: str) -> int:
        return sum(map(products_of_line, texts[name].splitlines()[1:]))

    def products_of_line(line: str) -> int:
        return bool(_PRODUCT.search(line)) + sum(products(called) for called in called_computations(line) if called in texts)

    bodies = {name for name in re.findall(r"body=%?([\w.-]+)", hlo) if products(name)}
    if not bodies:
        raise ValueError("the program has no loop with a matrix product.")
    body = texts[max(bodies, key=products)]
    lines = [found for line in body.splitlines() if (found := _parse(line))]
    shapes = {line.name: line.result for line in lines}
    place = {line.name: index for index, line in enumerate(lines)}
    ends = {line.operands[0]: place[line.name] for line in lines if line.operation.endswith("-done")}
    before = [0]
    for line in lines:
        before.append(before[-1] + products_of_line(line.line))
    return [
        Transfer(*moved, before[ends[line.name]] - before[place[line.name] + 1] if line.name in ends else 0)
        for line in lines
        if (moved := _moved(line, shapes))
    ]


def _parse(line: str) -> _Instruction | None:
    found = _LINE.match(line)
    if found is None:
        return None
    name, result, operation, operands, _ = found.groups()
    return _Instruction(name, result, operation, re.findall(r"%([\w.-]+)", operands), line)


def _moved(line: _Instruction, shapes: dict[str, str]) -> tuple[str, int] | None:
    """Kind and bytes of a copy; None for all else."""
    if line.operation.endswith("-done") or line.operation in MOVES_NOTHING:
        return None
    if line.operation in ("all-gather", "all-gather-start"):
        shape = line.result if line.operation == "all-gather" else _halves(line.result)[1]
        return "gather", array_bytes(shape)
    sources = [shapes.get(name, "") for name in line.operands]
    result = line.result
    if line.operation.endswith("-start"):  # (operands, result, context), of copies (result, operand, context)
        result = _halves(result)[0 if line.operation == "copy-start" else 1]
    comes, goes = HOST in result, any(HOST in source for source in sources)
    if not comes and not goes:
        return None
    if not comes:
        return "upload", array_bytes(result)
    moved = [source for source in sources if HOST not in source and "[]" not in source]  # a block that is written into a stack
    return ("download", sum(map(array_bytes, moved))) if moved else ("host copy", array_bytes(result))


def _halves(shapes: str) -> tuple[str, str]:
    """The first two elements of a tuple of shapes."""
    depth, parts = 0, [""]
    for sign in shapes[1:-1]:
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return parts[0], parts[1]
