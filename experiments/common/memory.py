"""Memory of this process and of the machine."""

import os
import resource

import jax


def peak_mib() -> float:
    """Peak resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB


def free_bytes() -> int:
    """Bytes that the default device has free, by its own account; without one, the machine's available memory.
    Where the system does not say, half of what there is.
    """
    account = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in account:
        return int(account["bytes_limit"] - account["bytes_in_use"])
    try:
        with open("/proc/meminfo") as file:
            rows = dict(line.split(":") for line in file)
        return int(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
