"""Timing several forms of the same work in one process, interleaved, so that a busy moment of the machine hits all alike."""

import importlib.metadata
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping

import jax


def interleaved_ms(forms: Mapping[str, Callable[[], object]], *, repeats: int) -> dict[str, float]:
    """Time every form once per round.

    Args:
        forms: name -> function without arguments that returns arrays; each is called twice before the first round.
        repeats: rounds, at least 10 for a number that is reported.

    Returns:
        Name -> median milliseconds.
    """
    return {name: statistics.median(times) for name, times in rounds_ms(forms, repeats=repeats).items()}


def rounds_ms(forms: Mapping[str, Callable[[], object]], *, repeats: int) -> dict[str, list[float]]:
    """As `interleaved_ms`, with the milliseconds of every round."""
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


def machine() -> dict[str, str]:
    """Device, versions and commit of this run."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
        commit = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = "unknown"
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "quax")}
    device = jax.devices()[0]
    return {"device": f"{jax.device_count()} x {device.device_kind}", "commit": commit, **versions}
