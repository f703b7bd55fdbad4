"""A generation as bytes: the payload of its record in a journal.

    number i32, sigma f32, pairs u32, encoding u8, mean fitness f32 where encoding has bit 1, coefficients, extra (the arrays
    that `runs.durable` carries), little-endian

Coefficients take 4 P bytes, or P / 5 when all are one of (-c, 0, c), as with `pair_sign`: three-valued digits, five a byte.
"""

import struct
from typing import Any, NamedTuple

import numpy as np

from eggroll.journal.header import JournalError

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


def decode(payload: bytes, place: Any = "the journal") -> Entry:
    """Decode the payload of a record; JournalError if it is no generation."""
    try:
        return _unpack(payload)
    except (struct.error, ValueError) as error:
        raise JournalError(f"{place} has a record with a sound checksum that is no generation: {error}.") from None


def _unpack(payload: bytes) -> Entry:
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
