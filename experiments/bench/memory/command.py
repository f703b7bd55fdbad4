"""Runs the memory benchmark: tables for people, then one line of JSON."""

from typing import Any

import jax

from eggroll.experiments.bench.memory import described, measured, rows, runs
from eggroll.experiments.bench.memory.options import Memory, check
from eggroll.experiments.bench.timing import machine
from eggroll.experiments.common.run import print_summary

TARGETS = {
    "cpu": rows.update_rows,
    "cpux8": rows.mesh_rows,
    "h100": rows.device_rows,
    "h100x8": rows.mesh_rows,
}


def run(config: Memory) -> None:
    """Run the benchmark; the last line of standard output is JSON.

    Raises:
        SystemExit: an option is wrong, the compiler or the GPU is missing, or a program failed; its row says why.
    """
    check(config)
    if config.program is not None:
        print_summary(measured.run_program(config))
        return
    if config.target in ("h100", "h100x8"):
        described.check_compiler()
    if config.target == "gpu":  # its processes need the GPU to themselves
        found = measured.rows(config)
        print_summary({"gpu": found})
        _exit_if_failed([row for programs in found.values() for row in programs.values()])
        return
    jax.config.update("jax_platforms", "cpu")
    if config.target == "run":
        print_summary({"run": runs.rows(config), "about": machine() | {"members": config.members}})
        return
    if config.target == "cpux8" and jax.config.values["jax_num_cpu_devices"] != 8:
        jax.config.update("jax_num_cpu_devices", 8)
    about = machine()
    print("  ".join(f"{key} {value}" for key, value in about.items()))
    found = TARGETS[config.target](config)
    print_summary({config.target: found, "about": about | {"members": config.members}})
    _exit_if_failed(list(found.values()))


def _exit_if_failed(found: list[dict[str, Any]]) -> None:
    if failed := sum(bool(row.get("failed")) for row in found):
        raise SystemExit(f"error: {failed} of {len(found)} rows could not be compiled or run, see above.")
