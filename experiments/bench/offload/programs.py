"""The programs of an offloaded step as it is built, and what they need.

    on a device = arguments + results - aliases + temporaries of a program + what else lies there meanwhile

Three blocks are on the device at most: one in use, the next on its way up, the last on its way down.
"""

from typing import Any

from eggroll.experiments.bench.memory.programs import Usage, tree_bytes
from eggroll.experiments.bench.offload.model import Step
from eggroll.zo.offload.passes import program

OTHER_BLOCKS = {"update_resident": 0, "begin": 0, "update_block": 2, "visit": 2, "end": 2}


def programs_of(step: Step) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Return the jitted programs of a step, in the order in which they run, and the shapes of their arguments."""
    streams, state, pending = step.streams, step.state, step.state.pending
    update_resident = program(streams, "update_resident", donate_argnums=2)
    return {
        "update_resident": (update_resident, (pending, state.key, state.resident)),
        "begin": (program(streams, "begin"), (state, step.batch)),
        "update_block": (program(streams, "update_block"), (pending, state.key, step.block, step.index)),
        "visit": (program(streams, "visit"), (state, step.block, step.index, step.carry, step.aux)),
        "end": (program(streams, "end"), (state, step.carry, step.batch)),
    }


def slice_bytes(step: Step) -> int:
    """Bytes of one device's slices of a block."""
    return tree_bytes(step.block) // step.streams.devices.mesh.size


def device_bytes(step: Step, name: str, used: Usage) -> int:
    """Return the bytes on a device while a program runs."""
    meanwhile = OTHER_BLOCKS[name] * slice_bytes(step)
    if name in ("update_block", "visit"):  # the others read the resident parameters, which are then among their arguments
        meanwhile += tree_bytes(step.state.resident)
    if name == "update_block":
        meanwhile += tree_bytes((step.carry, step.aux)) // step.streams.devices.mesh.size
    return used.peak + meanwhile
