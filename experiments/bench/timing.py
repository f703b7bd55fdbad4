"""Times several forms of the same work in one process, interleaved, so that a busy machine affects all of them equally."""

import contextlib
import functools
import importlib.metadata
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

import eggroll


def interleaved_ms(forms: Mapping[str, Callable[[], object]], *, repeats: int) -> dict[str, float]:
    """Time every form once per round.

    Args:
        forms: name -> function without arguments that returns arrays; each is called twice before the first round.
        repeats: rounds, at least 10 for reported numbers.

    Returns:
        Name -> median milliseconds.
    """
    return {name: statistics.median(times) for name, times in rounds_ms(forms, repeats=repeats).items()}


def rounds_ms(forms: Mapping[str, Callable[[], object]], *, repeats: int) -> dict[str, list[float]]:
    """Like `interleaved_ms`, but return the milliseconds of every round."""
    for form in forms.values():
        jax.block_until_ready(form())
        jax.block_until_ready(form())
    found: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(repeats):
        for name, form in forms.items():
            start = time.perf_counter()
            jax.block_until_ready(form())
            found[name].append(1e3 * (time.perf_counter() - start))
    return found


def advancing(advance: Callable[[Any], tuple[Any, Any]], state: Any) -> Callable[[], object]:
    """Return a form that runs `advance(state) -> (state, result)` on the state of its last call, which that consumes."""
    kept = [eggroll.copy_state(state)]

    def form() -> object:
        kept[0], result = advance(kept[0])
        return kept[0], result

    return form


def queued_ms(forms: Mapping[str, Callable[[], object]], *, repeats: int, round_ms: float) -> dict[str, float]:
    """Time every form once per round; enqueue several calls of a short one.

    A GPU works while the next call is dispatched; waiting after every call would add the dispatch time to each.

    Args:
        forms: name -> function without arguments that returns arrays; all are called before the first round.
        repeats: rounds, at least 10 for reported numbers.
        round_ms: least milliseconds of a round's calls, at most 100 of them; 0: one call per round.

    Returns:
        Name -> median milliseconds per call.
    """
    once = interleaved_ms(forms, repeats=1)
    counts = {name: max(1, min(100, math.ceil(round_ms / ms))) for name, ms in once.items()}
    queued = {name: functools.partial(_call_repeatedly, form, counts[name]) for name, form in forms.items()}
    return {name: ms / counts[name] for name, ms in interleaved_ms(queued, repeats=repeats).items()}


def _call_repeatedly(form: Callable[[], object], count: int) -> object:
    for _ in range(count - 1):
        form()
    return form()


def machine() -> dict[str, Any]:
    """Device, processor, cores of this run, load (runnable processes, last minute), versions and commit."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
        commit = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = "unknown"
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "quax")}
    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    host = {"processor": _processor(), "cores": cores, "load": round(os.getloadavg()[0], 1)}
    return {"device": f"{jax.device_count()} x {device.device_kind}", **host, "commit": commit, **versions}


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
