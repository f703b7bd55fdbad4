"""One flipped bit of a record is found by its checksum and flipped back.

CRC-32 is linear: crc(a) xor crc(b) = L(a xor b) for texts of one length. L of a single bit is different for each position, so
that the difference of the stored and the computed checksum names the bit. Any other damage is mistaken for a single flipped bit
with a probability of about 8n / 2^32 in a record of n bytes, so the corrected record is also checked for plausible content.
"""

import struct
import zlib

_POLYNOMIAL = 0xEDB88320
_PREFIX = struct.Struct("<BI")  # kind and length, which are in the checksum


def _table() -> list[int]:
    table = list(range(256))
    for _ in range(8):
        table = [value >> 1 ^ (_POLYNOMIAL if value & 1 else 0) for value in table]
    return table


_TABLE = _table()
_INDEX = {value >> 24: index for index, value in enumerate(_TABLE)}  # entries differ in their highest byte
_BITS = {_TABLE[1 << bit]: bit for bit in range(8)}


def correct(record: bytes, *, magic: bytes, kinds: tuple[int, ...]) -> bytes | None:
    """Return a damaged record with its one flipped bit flipped back; None if its damage is anything else.

    Args:
        record: all bytes of it: magic, kind, length, checksum, payload.
        magic: how it begins.
        kinds: that a record may have.
    """
    start = len(magic) + _PREFIX.size + 4
    if len(record) < start:
        return None
    payload = record[start:]
    for kind in kinds:
        prefix = _PREFIX.pack(kind, len(payload))
        wrong = _distance(record[: start - 4], magic + prefix)
        if wrong > 1:
            continue
        stored, computed = record[start - 4 : start], zlib.crc32(payload, zlib.crc32(prefix))
        difference = int.from_bytes(stored, "little") ^ computed
        if wrong + (difference.bit_count() == 1) == 1 and difference.bit_count() < 2:
            return magic + prefix + computed.to_bytes(4, "little") + payload
        if wrong == 0 and (fixed := _flip(payload, difference)) is not None:
            return magic + prefix + stored + fixed
    return None


def _distance(one: bytes, other: bytes) -> int:
    """Number of bits in which two texts of one length differ."""
    return (int.from_bytes(one, "little") ^ int.from_bytes(other, "little")).bit_count()


def _flip(payload: bytes, difference: int) -> bytes | None:
    """Flip the bit that changes the checksum by `difference`."""
    for place in range(len(payload) - 1, -1, -1):
        if difference in _BITS:
            changed = bytearray(payload)
            changed[place] ^= 1 << _BITS[difference]
            return bytes(changed)
        index = _INDEX[difference >> 24]  # the checksum before a byte of zeros
        difference = ((difference ^ _TABLE[index]) << 8 | index) & 0xFFFFFFFF
    return None
