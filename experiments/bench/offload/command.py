"""Compiles an offloaded step for described H100s: bytes on a device, bytes that cross, and what the schedule overlaps."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from eggroll.experiments.bench.collectives import executed_collective_bytes
from eggroll.experiments.bench.memory import described
from eggroll.experiments.bench.memory.programs import Usage, usage
from eggroll.experiments.bench.offload.model import MESHES, SIZES, Step, make_step, mesh_of
from eggroll.experiments.bench.offload.one_program import make_program
from eggroll.experiments.bench.offload.programs import device_bytes, programs_of, slice_bytes
from eggroll.experiments.bench.offload.schedule import Transfer, block_transfers
from eggroll.experiments.bench.timing import machine
from eggroll.experiments.common.run import print_summary

GIGA = 1e9
PUBLISHED_GB = {"175b": 18.04, "13b": 6.18}  # GPU memory, from the README of ZO2's code: OPT in float16, one text of 2,048
MANY = {"xla_gpu_experimental_parallel_async_compute_limit": 64}  # asynchronous copies in flight
ONE_PROGRAMS: dict[str, tuple[str, dict[str, Any]]] = {
    "in_turn": ("in_turn", {}),
    "scan": ("scan", MANY),
    "two_stacks": ("two_stacks", {}),
    "two_stacks, 64 copies": ("two_stacks", MANY),
}
Compile = Callable[..., Any]  # compile(function, shapes, options=...) -> compiled


@dataclasses.dataclass(frozen=True)
class OffloadBench:
    """Compile an offloaded step of an OPT model for one and for four H100s that need not be there."""

    model: Literal["175b", "13b", "tiny"] = "175b"
    """Sizes of the model, in bfloat16."""
    devices: tuple[Literal[1, 4], ...] = (1, 4)
    """1: ZO2; 4: the two signs over two devices, times two shards of the batch (DistZO2)."""
    recipe: Literal["mezo", "lozo"] = "mezo"
    """Dense normal noise, or low-rank noise."""
    tokens: int = 2048
    """Tokens of a text; every shard of the batch is one text."""


def run(config: OffloadBench) -> None:
    """Compile everything; the last line of standard output is JSON.

    Raises:
        SystemExit: a text is too long for the model, or the compiler is missing.
    """
    limit = SIZES[config.model].max_position_embeddings
    if not 2 <= config.tokens <= limit:
        raise SystemExit(f"error: tokens must be between 2 and the {limit} positions of the model, got {config.tokens}.")
    described.check_compiler("bench offload")
    jax.config.update("jax_platforms", "cpu")
    about = machine()
    print("  ".join(f"{key} {value}" for key, value in about.items()))
    found = {}
    for count in config.devices:
        with described.traced_for_hopper():
            step = make_step(SIZES[config.model], mesh_of(described.h100s(count)), tokens=config.tokens, recipe=config.recipe)
            found[str(count)] = row = compile_rows(step, described.compile_program, host=described.HostSharding)
        print_rows(f"OPT {config.model}, {config.recipe}, mesh {MESHES[count]}", row)
    published = PUBLISHED_GB.get(config.model) if config.tokens == 2048 else None
    print(f"published for ZO2 on one GPU: {published} GB")
    print_summary({"offload": found, "published_gb": published, "config": dataclasses.asdict(config), "about": about})


def compile_rows(step: Step, compile_program: Compile, *, host: Callable[[Mesh, Any], Any]) -> dict[str, Any]:
    """Compile a step as it is built and as one program.

    Args:
        step: the programs of a block and their shapes.
        compile_program: compiles a function for the devices of the step.
        host: makes shardings in the host's memory.
    """
    compiled = {name: compile_program(*found) for name, found in programs_of(step).items()}
    usages = {name: usage(found) for name, found in compiled.items()}
    crossing = {name: executed_collective_bytes(found.as_text()) for name, found in compiled.items()}
    row: dict[str, Any] = {"block_bytes": slice_bytes(step), "blocks": step.num_blocks}
    row |= {"usage": {name: found._asdict() for name, found in usages.items()}, "crossing": crossing}
    row |= {"device_bytes": device_bytes(step, usages), "step_crossing": _of_step(crossing, step.num_blocks)}
    build = functools.partial(make_program, step, host=host)
    row["one_program"] = {
        name: _one_program_row(compile_program(*build(form), options=options)) for name, (form, options) in ONE_PROGRAMS.items()
    }
    return row


def host_usage(compiled: Any) -> Usage:
    """Bytes of a program in the host's memory, for one device."""
    found = compiled.memory_analysis()
    names = ("argument_size_in_bytes", "output_size_in_bytes", "alias_size_in_bytes", "temp_size_in_bytes")
    return Usage(*(getattr(found, f"host_{name}") for name in names))


def spanning(transfers: list[Transfer], kind: str) -> dict[str, Any]:
    """Bytes of a kind in an iteration, and the share of them whose copies span a matrix product."""
    own = [transfer for transfer in transfers if transfer.kind == kind]
    total = sum(transfer.bytes for transfer in own)
    spans = sum(transfer.bytes for transfer in own if transfer.products)
    return {"bytes": total, "spanning": spans / total if total else None}


def _one_program_row(compiled: Any) -> dict[str, Any]:
    text = compiled.as_text()
    transfers = block_transfers(text)
    row: dict[str, Any] = {"device_bytes": usage(compiled).peak, "host_bytes": host_usage(compiled).peak}
    row |= {"host_temporaries": host_usage(compiled).temporaries, "crossing": executed_collective_bytes(text)}
    return row | {kind: spanning(transfers, kind) for kind in ("upload", "download", "host copy", "gather")}


def _of_step(crossing: dict[str, dict[str, int]], num_blocks: int) -> dict[str, int]:
    """Bytes of the collectives of a whole step."""
    total: dict[str, int] = {}
    for name, kinds in crossing.items():
        for kind, size in kinds.items():
            total[kind] = total.get(kind, 0) + size * (num_blocks if name in ("update_block", "visit") else 1)
    return total


def print_rows(title: str, row: dict[str, Any]) -> None:
    """Print what was found for one mesh; GB of one device."""
    print(f"{title}: slices of a block {row['block_bytes'] / GIGA:.3f} GB, {row['blocks']} blocks; GB of one device")
    print(f"{'program':<24}{'arguments':>10}{'results':>10}{'temporary':>10}{'on device':>10}{'crosses':>12}")
    for name, found in row["usage"].items():
        sizes = [found["arguments"], found["results"], found["temporaries"], row["device_bytes"][name]]
        numbers = "".join(f"{size / GIGA:>10.3f}" for size in sizes)
        print(f"{name:<24}{numbers}{sum(row['crossing'][name].values()) / GIGA:>12.6f}", flush=True)
    print(f"{'one program':<24}{'on device':>10}{'in host':>10}  bytes of an iteration (share whose copies span a product)")
    for name, found in row["one_program"].items():
        kinds = ((kind, found[kind]) for kind in ("upload", "download", "host copy", "gather") if found[kind]["bytes"])
        moved = ", ".join(f"{kind} {own['bytes'] / GIGA:.3f} ({own['spanning']:.2f})" for kind, own in kinds)
        print(f"{name:<24}{found['device_bytes'] / GIGA:>10.3f}{found['host_bytes'] / GIGA:>10.3f}  {moved}", flush=True)
