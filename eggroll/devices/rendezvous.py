"""The processes of a run meet on a socket before JAX connects them: jaxlib ends a process, without an exception, whose peers
do not come.

    first process     listens on the address until every other one has said its number, then tells all to go on; one that
                      ended meanwhile may be started again
    the others        connect, say their number, and wait

The port is then free again, for jaxlib's coordinator.
"""

import contextlib
import errno
import socket
import struct
import time
from collections.abc import Iterator

HELLO = struct.Struct("<8sII")  # magic, number of processes, index
MAGIC, GO = b"eggroll1", b"go"
PATIENCE = 5.0  # seconds that one who connects may take to say who it is


def meet(host: str, port: int, *, count: int, index: int, timeout: float) -> None:
    """Return when all processes are here.

    Args:
        host: of the first process, as the others see it.
        port: that it listens on.
        count: processes.
        index: of this one.
        timeout: seconds.

    Raises:
        RuntimeError: some did not come; the port is in use; two have the same number, or another number of processes.
    """
    deadline = time.monotonic() + timeout
    if index == 0:
        _wait_for_all(port, count, deadline, timeout)
    else:
        _report_to_first(host, port, count, index, deadline, timeout)


def _wait_for_all(port: int, count: int, deadline: float, timeout: float) -> None:
    here: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_listen(port))
        while len(here := _connected(here)) < count - 1:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                other, _ = server.accept()
            except TimeoutError:
                here = _connected(here)
                missing = ", ".join(str(index) for index in range(1, count) if index not in here)
                waited = f"process 0 of {count} waited {timeout:g} s at port {port} for {missing}"
                raise RuntimeError(f"{waited}, which did not come: start all of them.") from None
            stack.enter_context(other)
            hello = _receive(other, HELLO.size, min(deadline, time.monotonic() + PATIENCE))
            if len(hello) < HELLO.size or hello[:8] != MAGIC:
                continue  # not a process of this run
            _, theirs, index = HELLO.unpack(hello)
            here = _connected(here)  # a process that was started again replaces the one that ended
            if theirs != count or not 0 < index < count or index in here:
                raise RuntimeError(f"process {index} of {theirs} came to process 0 of {count}: numbers must differ, from 0 on.")
            here[index] = other
        server.close()  # before the others continue: jaxlib listens on this port next
        for other in here.values():
            other.sendall(GO)


def _connected(here: dict[int, socket.socket]) -> dict[int, socket.socket]:
    """The processes that have not ended meanwhile."""
    return {index: other for index, other in here.items() if not _has_ended(other)}


def _has_ended(other: socket.socket) -> bool:
    """Whether a process that waits, and so sends nothing, has closed its connection."""
    other.setblocking(False)
    try:
        return not other.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        other.settimeout(PATIENCE)


def _report_to_first(host: str, port: int, count: int, index: int, deadline: float, timeout: float) -> None:
    while True:
        reason = "it ended, or refused this process"
        try:
            with socket.create_connection((host, port), timeout=max(0.01, deadline - time.monotonic())) as first:
                first.sendall(HELLO.pack(MAGIC, count, index))
                if _receive(first, len(GO), deadline) == GO:
                    return
        except OSError as error:
            reason = str(error)
        if time.monotonic() > deadline:
            raise RuntimeError(f"the first process of this run was not found at {host}:{port} within {timeout:g} s: {reason}.")
        time.sleep(0.2)


@contextlib.contextmanager
def _listen(port: int) -> Iterator[socket.socket]:
    dual = socket.has_dualstack_ipv6()
    try:
        server = socket.create_server(("", port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual)
    except OSError as error:
        why = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used ({error})"
        raise RuntimeError(f"port {port} of the first process {why}: choose another in JAX_COORDINATOR_ADDRESS.") from None
    with server:
        yield server


def _receive(connection: socket.socket, size: int, deadline: float) -> bytes:
    """`size` bytes, or fewer where the other end closes or the time is up."""
    content = b""
    while len(content) < size:
        connection.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            part = connection.recv(size - len(content))
        except OSError:
            break
        if not part:
            break
        content += part
    return content
