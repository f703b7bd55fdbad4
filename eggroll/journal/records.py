"""The file of a journal: records with checksums, appended and read back.

    file     record*            the first is the header, then one per generation, without gaps
    record   magic "EGJ1"  kind u8  length u32  crc32 u32 (of kind, length and payload)  payload      little-endian
    header   JSON, see `header.Header`
    generation  number i32, sigma f32, pairs u32, encoding u8, mean fitness f32 where encoding has bit 1, coefficients, extra
                (the arrays that `runs.durable` carries)

Coefficients take 4 P bytes, or P / 5 when all are one of (-c, 0, c), as with `pair_sign`: three-valued digits, five a byte.
A last record truncated by a kill is dropped with a note. Damage before the last record is an error that names the generation.
"""

import dataclasses
import json
import os
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from eggroll.journal.header import READABLE, Header, JournalError

MAGIC = b"EGJ1"
HEADER, GENERATION = 0, 1
_FRAME = struct.Struct("<4sBII")
_ENTRY = struct.Struct("<ifIB")
_MEAN = struct.Struct("<f")
_FLOAT32, _TERNARY, _HAS_MEAN = 0, 1, 2  # encoding; the last is added to one of the others
_DIGITS = 3 ** np.arange(5, dtype=np.int64)


class Entry(NamedTuple):
    """One generation."""

    generation: int
    sigma: float
    coefficients: np.ndarray  # float32 [P]
    extra: bytes
    mean_fitness: float | None = None  # of the population; None in journals of versions before 0.3


class Reader:
    """Reads a journal record by record, without keeping them in memory.

    Args:
        path: the file.

    Raises:
        JournalError: the file is missing, or does not start with a readable header of this version.
    """

    def __init__(self, path: Path):
        self.path = path
        self.note: str | None = None  # set at the end: what was dropped there
        self.end = 0  # bytes of sound records read so far
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise JournalError(f"there is no journal {path}.") from None
        with open(path, "rb") as file:
            frame = _read_record(file, size)
        if frame is None or frame[0] != HEADER:
            raise JournalError(f"{path} is not a journal, or its header is damaged.")
        fields = json.loads(frame[1])
        if fields.get("version") not in READABLE:
            known = " and ".join(map(str, READABLE))
            raise JournalError(f"{path} has version {fields.get('version')} of the format; this library reads {known}.")
        self.header = Header(**fields)

    def __iter__(self) -> Iterator[Entry]:
        """Yield the generations in order.

        Raises:
            JournalError: a record before the last is damaged, or one is missing.
        """
        expected = None
        size = self.path.stat().st_size
        with open(self.path, "rb") as file:
            _read_record(file, size)
            while True:
                self.end = file.tell()
                record = _read_record(file, size)
                if record is None:
                    break
                entry = _decode(record[1])
                if expected is not None and entry.generation != expected:
                    raise JournalError(f"{self.path}: generation {expected} is missing.")
                expected = entry.generation + 1
                yield entry
            self._check_rest(file, size, expected or 0)

    def _check_rest(self, file: IO[bytes], size: int, expected: int) -> None:
        """Bytes after the last sound record are a truncated record, unless a sound record follows them."""
        if self.end == size:
            return
        file.seek(self.end)
        rest = file.read()
        start = rest.find(MAGIC, 1)
        while start >= 0:
            file.seek(self.end + start)
            if _read_record(file, size) is not None:
                raise JournalError(f"{self.path} is damaged at generation {expected} (byte {self.end}).")
            start = rest.find(MAGIC, start + 1)
        self.note = f"{self.path}: the last record, of generation {expected}, is incomplete and was dropped."


def _read_record(file: IO[bytes], size: int) -> tuple[int, bytes] | None:
    """Kind and payload of the record at the file's position; None when it is not sound."""
    head = file.read(_FRAME.size)
    if len(head) < _FRAME.size:
        return None
    magic, kind, length, crc = _FRAME.unpack(head)
    if magic != MAGIC or file.tell() + length > size:
        return None
    payload = file.read(length)
    return (kind, payload) if crc == _crc(kind, payload) else None


def _crc(kind: int, payload: bytes) -> int:
    return zlib.crc32(payload, zlib.crc32(struct.pack("<BI", kind, len(payload))))


def _record(kind: int, payload: bytes) -> bytes:
    return _FRAME.pack(MAGIC, kind, len(payload), _crc(kind, payload)) + payload


def encode(entry: Entry) -> bytes:
    """Encode a generation as the payload of its record."""
    values = np.asarray(entry.coefficients, np.float32)
    scale = np.abs(values).max() if values.size else np.float32(0)
    if np.isin(np.abs(values), np.array([0, scale], np.float32)).all():
        digits = np.zeros(-(-values.size // 5) * 5, np.int64)
        digits[: values.size] = np.sign(values) + 1
        packed = np.float32(scale).tobytes() + (digits.reshape(-1, 5) @ _DIGITS).astype(np.uint8).tobytes()
        encoding = _TERNARY
    else:
        packed, encoding = values.astype("<f4").tobytes(), _FLOAT32
    mean = b"" if entry.mean_fitness is None else _MEAN.pack(entry.mean_fitness)
    head = _ENTRY.pack(entry.generation, entry.sigma, values.size, encoding | (_HAS_MEAN if mean else 0))
    return head + mean + packed + entry.extra


def _decode(payload: bytes) -> Entry:
    generation, sigma, pairs, encoding = _ENTRY.unpack_from(payload)
    body, mean = payload[_ENTRY.size :], None
    if encoding & _HAS_MEAN:
        (mean,), body = _MEAN.unpack_from(body), body[_MEAN.size :]
    if encoding & _TERNARY == _FLOAT32:
        return Entry(generation, sigma, np.frombuffer(body, "<f4", pairs).astype(np.float32), body[4 * pairs :], mean)
    count = -(-pairs // 5)
    scale = np.frombuffer(body, "<f4", 1)[0]
    packed = np.frombuffer(body, np.uint8, count, offset=4).astype(np.int64)
    digits = (packed[:, None] // _DIGITS % 3).reshape(-1)[:pairs] - 1
    return Entry(generation, sigma, digits.astype(np.float32) * scale, body[4 + count :], mean)


def _replace_header(path: Path, header: Header) -> None:
    """Write a journal again with another header, or a new one without generations."""
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        file.write(_record(HEADER, json.dumps(dataclasses.asdict(header)).encode()))
        if path.exists() and path.stat().st_size:
            with open(path, "rb") as old:
                _read_record(old, path.stat().st_size)
                shutil.copyfileobj(old, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


class Writer:
    """Appends generations; once `append` returns, the record survives a kill of the process.

    Args:
        path: the file; created with the header, or continued if it is a journal of the same run.
        header: of the run.
        accept_change: the fitness and the optimizer may be others than before; the header then has their digests.

    Raises:
        JournalError: the file is damaged or belongs to another run; nothing is overwritten.
    """

    def __init__(self, path: Path, header: Header, *, accept_change: bool = False):
        self.next: int | None = None  # the generation to append next, None: any
        self._version = header.version  # a file is continued in the version that it began in
        if path.exists() and path.stat().st_size:
            reader = Reader(path)
            reader.header.check(header, accept_change=accept_change)
            if accept_change and reader.header.digests not in (None, header.digests):
                _replace_header(path, dataclasses.replace(reader.header, digests=header.digests, versions=header.versions))
                reader = Reader(path)
            self._version = reader.header.version
            for entry in reader:
                self.next = entry.generation + 1
            self.note = reader.note
            self._file = open(path, "r+b", buffering=0)  # noqa: SIM115
            self._file.truncate(reader.end)
            self._file.seek(reader.end)
        else:
            self.note = None
            _replace_header(path, header)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115

    def append(self, entry: Entry) -> None:
        """Append one generation.

        Raises:
            JournalError: it does not follow the last one.
            OSError: the disk is full or gone; earlier records stay readable.
        """
        if self.next is not None and entry.generation != self.next:
            raise JournalError(f"the journal continues with generation {self.next}, got {entry.generation}.")
        known = entry if self._version > 2 else entry._replace(mean_fitness=None)
        record, start = _record(GENERATION, encode(known)), self._file.tell()
        try:
            written = self._file.write(record)
            if written != len(record):
                raise OSError(f"only {written} of {len(record)} bytes of generation {entry.generation} could be written.")
        except OSError:
            self._file.truncate(start)
            raise
        self.next = entry.generation + 1

    def sync(self) -> None:
        """Flush to disk, so that the records survive a loss of power too."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close."""
        self.sync()
        self._file.close()
