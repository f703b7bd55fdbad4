"""Compiles an offloaded step for described H100s: bytes on a device, bytes that cross, and what the schedule overlaps."""

import dataclasses
from typing import Any, Literal

import jax

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
KINDS = ("upload", "download", "host copy", "gather")
PUBLISHED_GB = {"175b": 18.04, "13b": 6.18}  # GPU memory, from the README of ZO2's code: OPT in float16, one text of 2,048
MANY = {"xla_gpu_experimental_parallel_async_compute_limit": 64}  # asynchronous copies in flight
BEST = "two_stacks, 64 copies"
ONE_PROGRAMS: dict[str, tuple[str, dict[str, Any]]] = {
    "in_turn": ("in_turn", {}),
    "scan": ("scan", MANY),
    "two_stacks": ("two_stacks", {}),
    BEST: ("two_stacks", MANY),
}


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
        print(f"OPT {config.model}, {config.recipe}, population x data = {MESHES[count]}; GB of one device")
        with described.traced_for_hopper():
            step = make_step(SIZES[config.model], mesh_of(described.h100s(count)), tokens=config.tokens, recipe=config.recipe)
            row = {"block_bytes": slice_bytes(step), "blocks": step.num_blocks} | _separate_rows(step)
            row["one_program"] = {name: _one_program_row(step, name) for name in (ONE_PROGRAMS if count == 1 else (BEST,))}
        found[str(count)] = row
    published = PUBLISHED_GB.get(config.model) if config.tokens == 2048 else None
    print(f"published for ZO2 on one GPU: {published} GB")
    print_summary({"offload": found, "published_gb": published, "config": dataclasses.asdict(config), "about": about})


def _separate_rows(step: Step) -> dict[str, Any]:
    """Compile the programs of the step as it is built."""
    print(f"{'program':<24}" + "".join(f"{name:>12}" for name in ("arguments", "results", "temporary", "on device", "crosses")))
    row: dict[str, Any] = {"usage": {}, "device_bytes": {}, "crossing": {}}
    for name, (function, shapes) in programs_of(step).items():
        compiled = described.compile_program(function, shapes)
        used, crossing = usage(compiled), executed_collective_bytes(compiled.as_text())
        row["usage"][name], row["crossing"][name] = used._asdict(), crossing
        row["device_bytes"][name] = on_device = device_bytes(step, name, used)
        sizes = (used.arguments, used.results, used.temporaries, on_device, sum(crossing.values()))
        print(f"{name:<24}" + "".join(f"{size / GIGA:>12.3f}" for size in sizes), flush=True)
    return row | {"step_crossing": _of_step(row["crossing"], step.num_blocks)}


def _one_program_row(step: Step, name: str) -> dict[str, Any]:
    """Compile the step as one program and read its schedule."""
    form, options = ONE_PROGRAMS[name]
    compiled = described.compile_program(*make_program(step, form, host=described.HostSharding), options=options)
    text, host = compiled.as_text(), host_usage(compiled)
    transfers = block_transfers(text)
    moved = {kind: spanning(transfers, kind) for kind in KINDS}
    row: dict[str, Any] = {"device_bytes": usage(compiled).peak, "host_bytes": host.peak, "host_temporaries": host.temporaries}
    shown = ", ".join(
        f"{kind} {own['bytes'] / GIGA:.3f} ({own['spanning']:.2f})" for kind, own in moved.items() if own["bytes"]
    )
    print(f"{name:<24}on device {row['device_bytes'] / GIGA:.3f}, in host {row['host_bytes'] / GIGA:.3f}; in the loop's body,")
    print(f"{'':<24}with the share whose copies span a product: {shown}", flush=True)
    return row | {"crossing": executed_collective_bytes(text), "transfers": moved}


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


def _of_step(crossing: dict[str, dict[str, int]], num_blocks: int) -> dict[str, int]:
    """Bytes of the collectives of a whole step."""
    total: dict[str, int] = {}
    for name, kinds in crossing.items():
        for kind, size in kinds.items():
            total[kind] = total.get(kind, 0) + size * (num_blocks if name in ("update_block", "visit") else 1)
    return total
