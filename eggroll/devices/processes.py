"""Several processes as one run, each with its own devices: what they must agree on.

    processes.join()                                    first thing in a program, before any array is made
    mesh = jax.make_mesh((jax.device_count(),), ("population",))     devices of all processes
    ...                                                 every process runs the same program on the same values

`python -m eggroll.launch` starts several on one machine; on a cluster `srun` or `mpirun` does (docs/scaling.md). Files that
are not written by all together are written by the first process (`first_does`); what it raises, all raise.
"""

import contextlib
import hashlib
import io
import os
import pickle
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from eggroll.devices.rendezvous import meet

T = TypeVar("T")
LAUNCHED = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_LOST = re.compile(r"\bgloo\b|\bnccl|coordination service|distributed service", re.IGNORECASE)
SCHEDULED = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")  # set for the processes that srun or mpirun starts


def join(
    *,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: int = 120,
) -> bool:
    """Meet the other processes of this run, if there are any.

    Without arguments they are read from `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, or else from what
    SLURM (`srun`) or Open MPI (`mpirun`) say; where none of them speaks of several processes nothing happens.

    Args:
        coordinator_address: "host:port" that the first process listens on, a free port.
        num_processes: of the run.
        process_id: of this process, from 0.
        timeout: seconds to wait for the others.

    Returns:
        Whether there are several.

    Raises:
        ValueError: arguments or variables are incomplete or wrong.
        RuntimeError: the others did not come, or jax has been used already.
    """
    arguments = (coordinator_address, num_processes, process_id)
    given = {name: None if value is None else str(value) for name, value in zip(LAUNCHED, arguments, strict=True)}
    if all(value is None for value in arguments):
        given = {name: os.environ.get(name) for name in LAUNCHED}
    missing = [name for name, value in given.items() if value is None]
    scheduled = any(_count(os.environ.get(name, "1")) > 1 for name in SCHEDULED)
    if len(missing) == len(LAUNCHED):
        return _initialize(timeout) if scheduled else False
    if missing:
        raise ValueError(f"several processes need all of {', '.join(LAUNCHED)}; missing: {', '.join(missing)}.")
    try:
        address, count, index = str(given[LAUNCHED[0]]), int(str(given[LAUNCHED[1]])), int(str(given[LAUNCHED[2]]))
    except ValueError:
        raise ValueError(f"JAX_NUM_PROCESSES and JAX_PROCESS_ID must be integers, got {given}.") from None
    host, _, port = address.rpartition(":")
    if not 0 <= index < count or not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise ValueError(
            f"process {index} of {count} at {address!r}: need 0 <= process < number, and an address host:port with a port "
            "from 1 to 65535."
        )
    if count == 1:
        return False
    meet(host.strip("[]"), int(port), count=count, index=index, timeout=timeout)
    if index > 0:
        _wait_for(address, timeout)
    return _initialize(timeout, coordinator_address=address, num_processes=count, process_id=index)


def _count(text: str) -> int:
    """The number of tasks in what a scheduler says: "4", or "4(x2)" for 4 on each of 2 nodes."""
    found = re.match(r"(\d+)(?:\(x(\d+)\))?", text.strip())
    return int(found[1]) * int(found[2] or 1) if found else 1


def _initialize(
    timeout: int, coordinator_address: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> bool:
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=20,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise RuntimeError(f"the processes of this run did not meet within {timeout} s: {reason}") from error
    several = jax.process_count() > 1
    if several:
        sys.excepthook = _end_with(sys.excepthook)
    return several


def _wait_for(address: str, timeout: int) -> None:
    """Wait until the first process listens; jaxlib, left to itself, ends this process without an exception."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=timeout).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"the first process of this run was not found at {address} within {timeout} s: {error}."
                ) from None
            time.sleep(0.2)


def end_at_once(code: int) -> NoReturn:
    """End a process that has failed: the shutdown of jaxlib would wait minutes for others, which wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end_with(show: Callable[..., Any]) -> Callable[..., Any]:
    """A hook for uncaught exceptions that shows them and ends the process."""

    def show_and_end(*raised: Any) -> None:
        show(*raised)
        end_at_once(1)

    return show_and_end


def is_first() -> bool:
    """Whether this process writes the files and the progress line: process 0, or the only one."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Return when every process has come here; `name` must be the same for all."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def minimum_over_processes(value: int) -> int:
    """The minimum over all processes of a number of bytes, in whole MiB; every process must call it."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    mebibytes = np.int32(value >> 20)  # jax has no 64 bits
    return int(multihost_utils.process_allgather(mebibytes).min()) << 20


def broadcast_from_first(make: Callable[[], np.ndarray]) -> np.ndarray:
    """Call `make` in the first process only and return its result in all of them; every process must call this.

    Raises:
        Exception: what `make` raised, in all processes.
    """
    if jax.process_count() == 1:
        return make()
    from jax.experimental import multihost_utils

    content, error = b"", None
    if is_first():
        try:
            content = _encode(make())
        except Exception as raised:
            content, error = _encode_error(raised), raised
    size, failed = multihost_utils.broadcast_one_to_all(np.array([len(content), error is not None], np.int32)).tolist()
    received = np.frombuffer(content.ljust(size, b"\0"), np.uint8)
    received = multihost_utils.broadcast_one_to_all(received).tobytes()
    if failed:
        raise pickle.loads(received) if error is None else error
    return np.load(io.BytesIO(received))


def first_does(action: Callable[[], T]) -> T | None:
    """Call `action` in the first process only, while the others wait; every process must call this.

    Returns:
        What `action` returns; None in the other processes.

    Raises:
        Exception: what `action` raised, in all processes.
    """
    result = None

    def make() -> np.ndarray:
        nonlocal result
        result = action()
        return np.zeros(0, np.uint8)

    broadcast_from_first(make)
    return result


def _encode(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _encode_error(error: Exception) -> bytes:
    """An error for the other processes: its type and text, or a RuntimeError where they could not rebuild it."""
    try:
        content = pickle.dumps(error)
        pickle.loads(content)
    except Exception:
        content = pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return content


def check_same(values: np.ndarray, name: str) -> None:
    """Compare the bytes of an array, NaN included, over the processes.

    Raises:
        ValueError: they differ; `name` says what was compared.
    """
    from jax.experimental import multihost_utils

    digest = np.frombuffer(hashlib.sha256(values.tobytes()).digest(), np.uint32)
    digests = multihost_utils.process_allgather(digest)
    if (digests != digests[0]).any():
        raise ValueError(f"the processes of this run have different values of {name}: they must be the same on all of them.")


@contextlib.contextmanager
def report_lost_process(what: str) -> Iterator[None]:
    """Turn an error of JAX that a lost process caused into a clear one; `what` was being done."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if jax.process_count() > 1 and _LOST.search(str(error)):
            here = f"process {jax.process_index()} of {jax.process_count()}"
            raise RuntimeError(
                f"{here} lost another process of this run in {what}; restart all of them, a durable run resumes. "
                f"({str(error).splitlines()[0]})"
            ) from error
        raise


def local(tree: Any) -> Any:
    """Arrays of all processes as arrays of this one; every process has to ask. Others stay as they are."""
    return jax.tree.map(lambda x: x if getattr(x, "is_fully_addressable", True) else jnp.asarray(gather(x)), tree)


def gather(array: Any) -> np.ndarray:
    """Gather an array sharded over several processes as a NumPy array; every process must call this."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        from jax.experimental import multihost_utils

        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)
