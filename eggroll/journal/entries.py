"""A generation as bytes: the payload of its record in a journal.

    number i32, sigma f32, pairs u32, encoding u8, mean fitness f32 where encoding has bit 1, checksums where it has bit 2,
    coefficients, extra (the arrays that `runs.durable` carries), little-endian
    checksums   environment u32, arrays u32, after u32 [arrays], before u32 [arrays] where encoding has bit 3

Coefficients take 4 P bytes, or P / 5 when all are one of (-c, 0, c), as with `pair_sign`: three-valued digits, five a byte.
"""

import struct
from typing import Any, NamedTuple

import numpy as np

from eggroll.journal.header import JournalError

_ENTRY = struct.Struct("<ifIB")
_MEAN = struct.Struct("<f")
_SUMS = struct.Struct("<II")
_FLOAT32, _TERNARY = 0, 1  # encoding; those of the next line are added
_HAS_MEAN, _HAS_SUMS, _HAS_BEFORE, _IS_ADOPTED, _UNKNOWN = 2, 4, 8, 16, 224
_DIGITS = 3 ** np.arange(5, dtype=np.int64)


class Sums(NamedTuple):
    """The checksums of the arrays of a state (`eggroll.update.checksums`), after a generation and before it."""

    after: np.ndarray  # uint32 [arrays]
    before: np.ndarray | None  # None: those after the generation before
    is_adopted: bool  # the state before it was changed by hand
    environment: int  # that the update ran in: `environment.environment_id`


class Entry(NamedTuple):
    """One generation."""

    generation: int
    sigma: float
    coefficients: np.ndarray  # float32 [P]
    extra: bytes
    mean_fitness: float | None = None  # of the population; None in journals of versions before 0.3
    sums: Sums | None = None  # None in journals of formats before 4


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
    flags, sums = _encode_sums(entry.sums)
    head = _ENTRY.pack(entry.generation, entry.sigma, values.size, encoding | flags | (_HAS_MEAN if mean else 0))
    return head + mean + sums + packed + entry.extra


def _encode_sums(sums: Sums | None) -> tuple[int, bytes]:
    if sums is None:
        return 0, b""
    flags = _HAS_SUMS | (0 if sums.before is None else _HAS_BEFORE) | (_IS_ADOPTED if sums.is_adopted else 0)
    arrays = b"".join(part.astype("<u4").tobytes() for part in (sums.after, sums.before) if part is not None)
    return flags, _SUMS.pack(sums.environment, sums.after.size) + arrays


def _decode_sums(encoding: int, body: bytes) -> tuple[Sums | None, bytes]:
    if not encoding & _HAS_SUMS:
        return None, body
    environment, size = _SUMS.unpack_from(body)
    parts, end = [], _SUMS.size
    for _ in range(2 if encoding & _HAS_BEFORE else 1):
        parts.append(np.frombuffer(body, "<u4", size, offset=end).astype(np.uint32))
        end += 4 * size
    after, before = (*parts, None)[:2]
    assert after is not None
    return Sums(after, before, bool(encoding & _IS_ADOPTED), environment), body[end:]


def decode(payload: bytes, place: Any = "the journal") -> Entry:
    """Decode the payload of a record; JournalError if it is no generation."""
    try:
        return _unpack(payload)
    except (struct.error, ValueError) as error:
        raise JournalError(f"{place} has a record with a sound checksum that is no generation: {error}.") from None


def _unpack(payload: bytes) -> Entry:
    generation, sigma, pairs, encoding = _ENTRY.unpack_from(payload)
    if encoding & _UNKNOWN:
        raise ValueError(f"its encoding {encoding} is not known")
    body, mean = payload[_ENTRY.size :], None
    if encoding & _HAS_MEAN:
        (mean,), body = _MEAN.unpack_from(body), body[_MEAN.size :]
    sums, body = _decode_sums(encoding, body)
    if encoding & _TERNARY == _FLOAT32:
        return Entry(generation, sigma, np.frombuffer(body, "<f4", pairs).astype(np.float32), body[4 * pairs :], mean, sums)
    count = -(-pairs // 5)
    scale = np.frombuffer(body, "<f4", 1)[0]
    packed = np.frombuffer(body, np.uint8, count, offset=4).astype(np.int64)
    digits = (packed[:, None] // _DIGITS % 3).reshape(-1)[:pairs] - 1
    return Entry(generation, sigma, digits.astype(np.float32) * scale, body[4 + count :], mean, sums)
