"""Several processes as one run, each with devices of its own: what they have to agree on.

    processes.join()                                    first thing in a program, before any array is made
    mesh = jax.make_mesh((jax.device_count(),), ("population",))     devices of all processes
    ...                                                 every process runs the same program on the same values

`python -m eggroll.launch` starts several on one machine; on a cluster `srun` or `mpirun` does (docs/scaling.md). Files that
are not written by all together are written by the first process.
"""

import os
from typing import Any

import jax
import numpy as np

LAUNCHED = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
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
    given: dict[str, Any] = dict(zip(LAUNCHED, (coordinator_address, num_processes, process_id), strict=True))
    if all(value is None for value in given.values()):
        given = {name: os.environ.get(name) for name in LAUNCHED}
    missing = [name for name, value in given.items() if value is None]
    scheduled = any(int(os.environ.get(name, 1)) > 1 for name in SCHEDULED)
    if len(missing) == len(LAUNCHED):
        return _initialize(timeout) if scheduled else False
    if missing:
        raise ValueError(f"several processes need all of {', '.join(LAUNCHED)}; missing: {', '.join(missing)}.")
    try:
        address, count, index = given["JAX_COORDINATOR_ADDRESS"], *(int(given[name]) for name in LAUNCHED[1:])
    except ValueError:
        raise ValueError(f"JAX_NUM_PROCESSES and JAX_PROCESS_ID must be integers, got {given}.") from None
    if not 0 <= index < count or not address.rpartition(":")[2].isdigit():
        raise ValueError(f"process {index} of {count} at {address!r}: need 0 <= process < number, and an address host:port.")
    if count == 1:
        return False
    return _initialize(timeout, coordinator_address=address, num_processes=count, process_id=index)


def _initialize(timeout: int, **where: Any) -> bool:
    try:
        # A process that ends alone waits for the others as long as the heartbeat.
        jax.distributed.initialize(**where, initialization_timeout=timeout, heartbeat_timeout_seconds=20)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise RuntimeError(f"the processes of this run did not meet within {timeout} s: {reason}") from error
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this process writes the files and the progress line: process 0, or the only one."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Return when every process has come here; `name` must be the same for all."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def whole(array: Any) -> np.ndarray:
    """The whole of an array whose parts lie on several processes; every process has to ask for it."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        from jax.experimental import multihost_utils

        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)
