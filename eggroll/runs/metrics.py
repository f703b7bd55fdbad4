"""`metrics.jsonl`: a JSON object a line, with a checksum of the text before it.

    {"generation": 3, ..., "crc32": "0a1b2c3d"}

A damaged line is dropped with one warning a file; a last line that a kill truncated, without one. Lines without a checksum, of
earlier versions or written by hand, are taken as they are.
"""

import errno
import logging
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from eggroll.files import Damaged, naming, parse_object, replace_file

logger = logging.getLogger(__name__)
NAME, CHECKSUM = "metrics.jsonl", "crc32"
_MARK = f', "{CHECKSUM}": "'.encode()


def seal(line: str) -> str:
    """Add the checksum to a JSON object of at least one field, and the end of the line."""
    text = line.removesuffix("}").encode()
    return f'{line.removesuffix("}")}, "{CHECKSUM}": "{zlib.crc32(text):08x}"}}\n'


def read_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield the sound lines of a file and their fields, without the checksum."""
    lines, damaged = path.read_bytes().split(b"\n"), []
    for number, line in enumerate(lines, 1):
        try:
            fields = _parse(line)
        except Damaged:
            if number < len(lines):
                damaged.append(number)
            continue
        yield line, fields
    if damaged:
        logger.warning("%s: %d damaged lines were dropped, the first is line %d.", path, len(damaged), damaged[0])


def _parse(line: bytes) -> dict[str, Any]:
    fields = parse_object(line, "the line")
    text, mark, checksum = line.rpartition(_MARK)
    if mark and fields.pop(CHECKSUM, None) and checksum != f'{zlib.crc32(text):08x}"}}'.encode():
        raise Damaged("the line has another checksum.")
    return fields


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read the sound lines of the folder's `metrics.jsonl`; none where there is no such file."""
    path = folder / NAME
    return [fields for _, fields in read_lines(path)] if path.exists() else []


def open_metrics(folder: Path, first: int) -> IO[bytes]:
    """Open `metrics.jsonl` to append generation `first`; lines from `first` on, of a lost continuation, are dropped."""
    folder.mkdir(parents=True, exist_ok=True)
    path, kept = folder / NAME, list[bytes]()
    if first > 0 and path.exists():
        for line, fields in read_lines(path):
            if isinstance(generation := fields.get("generation"), int) and generation < first:
                kept.append(line + b"\n")
    replace_file(path, kept)
    return open(path, "ab", buffering=0)


def append_line(folder: Path, first: int, line: str) -> None:
    """Append one line, which is of generation `first` or later, to `metrics.jsonl`, as `open_metrics` and `write_line` do."""
    with open_metrics(folder, first) as file:
        write_line(file, line)


def write_line(file: IO[bytes], line: str) -> None:
    """Append a line; OSError, with the name of the file, where it cannot be written."""
    content = seal(line).encode()
    with naming(Path(file.name)):
        if file.write(content) != len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
