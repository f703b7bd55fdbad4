"""The file of a journal: records with checksums, appended and read back.

    file     record*            the first is the header, then one per generation, without gaps
    record   magic "EGJ1"  kind u8  length u32  crc32 u32 (of kind, length and payload)  payload      little-endian
    header   JSON, see `header.Header`
    generation  see `entries`

A last record truncated by a kill is dropped with a note; if there is more than its frame, it is copied aside. Damage before the
last record is an error that names the generation; `recovery` mends the file where a checkpoint allows it.
"""

import dataclasses
import errno
import json
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from eggroll.files import PIECE, parse_object, replace_file, unused_name
from eggroll.journal.entries import Entry, decode, encode
from eggroll.journal.header import READABLE, Header, JournalError, write_copy

MAGIC = b"EGJ1"
HEADER, GENERATION = 0, 1
FRAME = struct.Struct("<4sBII")


class Gap(NamedTuple):
    """A place of a journal where generations are missing, or bytes that are no record."""

    start: int  # byte
    end: int  # byte; equal to `start` where no damaged bytes are left
    first: int  # the generations from `first` to below `next` are missing
    next: int | None  # the generation that follows; None: none does


class Reader:
    """Reads a journal record by record, without keeping them in memory.

    Args:
        path: the file.
        tolerant: continue at the next sound record where one is damaged or missing; after the iteration `gaps` lists these
            places. The header may be damaged too: see `has_header`.

    Raises:
        JournalError: the file is missing, or does not start with a readable header of this version.
    """

    def __init__(self, path: Path, *, tolerant: bool = False):
        self.path = path
        self.note: str | None = None  # set at the end: what was dropped there
        self.end = 0  # bytes of sound records read so far
        self.gaps: list[Gap] = []
        self._tolerant = tolerant
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise JournalError(f"there is no journal {path}.") from None
        with open(path, "rb") as file:
            frame = _read_record(file, size)
            self._first = file.tell()  # byte of the first generation
        self._header = None if frame is None or frame[0] != HEADER else _parse_header(frame[1], path)
        if self._header is None:
            self._first = 0
            if not tolerant:
                raise self._damaged_header()

    @property
    def has_header(self) -> bool:
        """Whether the header is sound."""
        return self._header is not None

    @property
    def header(self) -> Header:
        """The header; JournalError if it is damaged."""
        if self._header is None:
            raise self._damaged_header()
        return self._header

    def _damaged_header(self) -> JournalError:
        return JournalError(f"{self.path} is not a journal, or its header is damaged.")

    def __iter__(self) -> Iterator[Entry]:
        """Yield the generations in order.

        Raises:
            JournalError: a record before the last is damaged, or one is missing, unless the reader is tolerant; generations
                are not in order.
        """
        expected = 0 if self._tolerant else None
        size, start = self.path.stat().st_size, self._first
        self.gaps = []
        with open(self.path, "rb") as file:
            while True:
                self.end = start
                at = start if _is_generation(file, start, size) else _find_record(file, start + 1, size)
                if at is None:
                    break
                if at != start and not self._tolerant:
                    raise JournalError(f"{self.path} is damaged at generation {expected or 0} (byte {start}).")
                file.seek(at)
                record = _read_record(file, size)
                assert record is not None
                entry, start = decode(record[1], self.path), file.tell()
                self._check_order(entry, expected, self.end, at)
                expected = entry.generation + 1
                yield entry
        if start < size:
            self.note = f"{self.path}: the last record, of generation {expected or 0}, is incomplete and was dropped."

    def _check_order(self, entry: Entry, expected: int | None, start: int, at: int) -> None:
        """Note a gap before an entry that was read at byte `at`, if there is one."""
        if expected is not None and entry.generation != expected:
            if entry.generation < expected:
                raise JournalError(f"{self.path}: generation {entry.generation} follows generation {expected - 1}.")
            if not self._tolerant:
                raise JournalError(f"{self.path}: generation {expected} is missing.")
        if self._tolerant and (at != start or entry.generation != expected):
            self.gaps.append(Gap(start, at, expected or 0, entry.generation))


def _parse_header(content: bytes, path: Path) -> Header:
    fields = parse_object(content, f"the header of {path}")
    if fields.get("version") not in READABLE:
        known = ", ".join(map(str, READABLE))
        raise JournalError(f"{path} has version {fields.get('version')} of the format; this library reads {known}.")
    try:
        return Header(**fields)
    except TypeError as error:
        raise JournalError(f"the header of {path} has other fields than this library knows: {error}.") from None


def _is_generation(file: IO[bytes], start: int, size: int) -> bool:
    file.seek(start)
    record = _read_record(file, size)
    return record is not None and record[0] == GENERATION


def _find_record(file: IO[bytes], start: int, size: int) -> int | None:
    """The place of the next sound generation from byte `start` on."""
    while start < size:
        file.seek(start)
        data = file.read(PIECE + len(MAGIC) - 1)
        at = data.find(MAGIC)
        while at >= 0:
            if _is_generation(file, start + at, size):
                return start + at
            at = data.find(MAGIC, at + 1)
        start += PIECE
    return None


def _read_record(file: IO[bytes], size: int) -> tuple[int, bytes] | None:
    """Kind and payload of the record at the file's position; None when it is not sound."""
    head = file.read(FRAME.size)
    if len(head) < FRAME.size:
        return None
    magic, kind, length, crc = FRAME.unpack(head)
    if magic != MAGIC or file.tell() + length > size:
        return None
    payload = file.read(length)
    return (kind, payload) if crc == _crc(kind, payload) else None


def _crc(kind: int, payload: bytes) -> int:
    return zlib.crc32(payload, zlib.crc32(struct.pack("<BI", kind, len(payload))))


def _record(kind: int, payload: bytes) -> bytes:
    return FRAME.pack(MAGIC, kind, len(payload), _crc(kind, payload)) + payload


def encode_header(header: Header) -> bytes:
    """Encode the record of a header."""
    return _record(HEADER, json.dumps(dataclasses.asdict(header)).encode())


def _replace_header(path: Path, header: Header) -> None:
    """Write a journal again with another header."""

    def pieces() -> Iterator[bytes]:
        yield encode_header(header)
        with open(path, "rb") as old:
            _read_record(old, path.stat().st_size)
            while piece := old.read(1 << 20):
                yield piece

    replace_file(path, pieces())


def _keep_tail(path: Path, start: int) -> Path:
    """Copy the bytes from `start` on, which are about to be dropped."""
    copy = unused_name(path.with_name("journal.damaged.bin"))
    with open(path, "rb") as file:
        file.seek(start)
        replace_file(copy, iter(lambda: file.read(PIECE), b""))
    return copy


class Writer:
    """Appends generations; once `append` returns, the record survives a kill of the process.

    Args:
        path: the file; created with the header, or continued if it is a journal of the same run.
        header: of the run.
        accept_change: what has a digest may be another than before; the header then has the new digests.
        covered: generation of the checkpoint that the run continues from; earlier generations may be missing from the file.

    Raises:
        JournalError: the file is damaged or belongs to another run; nothing is overwritten.
    """

    def __init__(self, path: Path, header: Header, *, covered: int = 0, accept_change: bool = False):
        self.next: int | None = covered or None  # the generation to append next, None: any
        self._path = path
        if path.exists() and path.stat().st_size:
            reader = Reader(path, tolerant=True)
            reader.header.check(header, accept_change=accept_change)
            current = reader.header.continued_by(header, accept_change=accept_change)
            if current != reader.header:
                _replace_header(path, current)
                reader = Reader(path, tolerant=True)
            write_copy(path, reader.header)
            for entry in reader:
                self.next = max(covered, entry.generation + 1)
            for gap in reader.gaps:
                if gap.start < gap.end:
                    raise JournalError(f"{path} is damaged at generation {gap.first} (byte {gap.start}).")
            self.note = reader.note
            if path.stat().st_size - reader.end > FRAME.size:
                self.note = f"{reader.note} Its bytes are in {_keep_tail(path, reader.end).name}."
            self._file = open(path, "r+b", buffering=0)  # noqa: SIM115
            if reader.end < path.stat().st_size:  # a run that has ended stays untouched
                self._file.truncate(reader.end)
            self._file.seek(reader.end)
        else:
            self.note = None
            replace_file(path, encode_header(header))
            write_copy(path, header)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115

    def append(self, entry: Entry) -> None:
        """Append one generation.

        Raises:
            JournalError: it does not follow the last one.
            OSError: the disk is full or gone; earlier records stay readable.
        """
        if self.next is not None and entry.generation != self.next:
            raise JournalError(f"the journal continues with generation {self.next}, got {entry.generation}.")
        record, start = _record(GENERATION, encode(entry)), self._file.tell()
        try:
            written = self._file.write(record)
            if written != len(record):
                raise OSError(errno.ENOSPC, f"only {written} of {len(record)} bytes of a generation could be written")
        except OSError as error:
            self._file.truncate(start)
            raise OSError(error.errno, error.strerror or str(error), str(self._path)) from error
        self.next = entry.generation + 1

    def sync(self) -> None:
        """Flush to disk, so that the records survive a loss of power too."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close."""
        self.sync()
        self._file.close()
