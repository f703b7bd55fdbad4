"""Messages between a trainer and a worker that may hang, die or write nonsense: frames on a socket; the trainer never blocks.

    frame    magic "EGW1", length u64 (little-endian), payload

The trainer's end is a `Channel`; the worker's functions, `send` and `receive`, block.
"""

import socket
import struct

_FRAME = struct.Struct("<4sQ")
_MAGIC = b"EGW1"
LARGEST = 1 << 28  # bytes of a message from a worker


class Unreadable(ValueError):
    """What came from a worker is no message."""


class Channel:
    """The trainer's end.

    Args:
        end: one of a pair of connected sockets.
    """

    def __init__(self, end: socket.socket):
        self._end = end
        self._end.setblocking(False)
        self._out, self._in = memoryview(b""), bytearray()

    def fileno(self) -> int:
        """For `select`."""
        return self._end.fileno()

    @property
    def has_more_to_send(self) -> bool:
        """Whether a message is still on its way."""
        return len(self._out) > 0

    def start_to_send(self, payload: bytes) -> None:
        """Start sending a message; `send_more` continues.

        Raises:
            OSError: the worker has ended.
        """
        self._out = memoryview(bytes(self._out) + _FRAME.pack(_MAGIC, len(payload)) + payload)
        self.send_more()

    def send_more(self) -> None:
        """Send as much as the socket takes.

        Raises:
            OSError: the worker has ended.
        """
        try:
            while self._out:
                self._out = self._out[self._end.send(self._out) :]
        except BlockingIOError:
            pass

    def receive(self) -> bytes | None:
        """Return a message, or None where the rest of it has not come yet.

        Raises:
            EOFError, OSError: the worker has ended.
            Unreadable: it sent something else, or more than `LARGEST` bytes.
        """
        try:
            while part := self._end.recv(1 << 20):
                self._in += part
                if (message := self._take()) is not None:
                    return message
        except BlockingIOError:
            return None
        raise EOFError

    def _take(self) -> bytes | None:
        if len(self._in) < _FRAME.size:
            return None
        magic, length = _FRAME.unpack_from(self._in)
        if magic != _MAGIC or length > LARGEST:
            raise Unreadable
        end = _FRAME.size + length
        if len(self._in) < end:
            return None
        message = bytes(self._in[_FRAME.size : end])
        del self._in[:end]
        return message

    def close(self) -> None:
        """Close; the worker ends."""
        self._end.close()


def send(end: socket.socket, payload: bytes) -> None:
    """Send a message, in a worker."""
    end.sendall(_FRAME.pack(_MAGIC, len(payload)) + payload)


def receive(end: socket.socket) -> bytes:
    """Wait for a message, in a worker.

    Raises:
        EOFError, OSError: the trainer has ended.
    """
    _, length = _FRAME.unpack(_read(end, _FRAME.size))
    return _read(end, length)


def _read(end: socket.socket, size: int) -> bytes:
    content = bytearray()
    while len(content) < size:
        part = end.recv(min(size - len(content), 1 << 20))
        if not part:
            raise EOFError
        content += part
    return bytes(content)
