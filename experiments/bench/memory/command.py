"""Runs the memory benchmark: tables for people, then one line of JSON."""

import jax

from eggroll.experiments.bench.memory import described, measured, rows
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
    """Run the benchmark; the last line of standard output is JSON."""
    check(config)
    if config.program is not None:
        print_summary(measured.run_program(config))
        return
    if config.target in ("h100", "h100x8"):
        described.check_compiler()
    if config.target == "gpu":  # its processes need the GPU to themselves
        print_summary({"gpu": measured.rows(config)})
        return
    jax.config.update("jax_platforms", "cpu")
    if config.target == "cpux8" and jax.config.values["jax_num_cpu_devices"] != 8:
        jax.config.update("jax_num_cpu_devices", 8)
    about = machine()
    print("  ".join(f"{key} {value}" for key, value in about.items()))
    print_summary({config.target: TARGETS[config.target](config), "about": about | {"members": config.members}})
