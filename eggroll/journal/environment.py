"""The environment that an update runs in: replay gives the same bits in the same one, and may round differently in others."""

import functools
import os
import zlib
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from eggroll.version import VERSION

UPDATE = 2  # version of the arithmetic of an update; 2: block by block, with other random bits for stochastic rounding
PACKAGES = ("jax", "jaxlib", "optax")


def describe_environment(state: Any) -> str:
    """Describe the backend, the devices that a state lies on, and the versions of the software."""
    devices = state.generation.sharding.device_set
    kind = next(iter(devices)).device_kind
    where = _processor() if jax.default_backend() == "cpu" else f"{jax.default_backend()} {kind}"
    own = f"eggroll {VERSION}"  # not that of the installation, which an editable one keeps
    versions = ", ".join([*(f"{name} {_version(name)}" for name in PACKAGES), own, f"update {UPDATE}"])
    flags = os.environ.get("XLA_FLAGS", "")
    return f"{where}, {len(devices)} devices, {jax.process_count()} processes, {versions}" + (f", {flags}" if flags else "")


def environment_id(state: Any) -> int:
    """Return what records have of an environment: the CRC-32 of its description."""
    return zlib.crc32(describe_environment(state).encode())


@functools.cache
def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "?"


@functools.cache
def _processor() -> str:
    """The processor, its instructions and the threads of a program, on which the code that XLA generates depends."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)  # of the first core
    known = {name.strip(): value.strip() for name, value in found.items()}
    instructions = zlib.crc32(known.get("flags", known.get("Features", "")).encode())
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"cpu {known.get('model name', '')} {instructions:08x}, {threads} threads"
