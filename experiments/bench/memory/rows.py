"""Rows of the tables: the programs of one generation, compiled, and what their compiler says."""

import contextlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import eggroll
from eggroll.experiments.bench.collectives import executed_collective_bytes
from eggroll.experiments.bench.memory import described, models, optimizers, programs
from eggroll.experiments.bench.memory.options import Memory, chosen_models

GIGA = 1e9
PROGRAMS = ("plain", "evaluate", "update")
MESHES = ((1, 8), (2, 4))  # devices along "population", along "model"


class Compiled(NamedTuple):
    """What is known of one compiled program; `failed` says why nothing is."""

    usage: programs.Usage | None
    seconds: float  # to trace, lower and compile
    crossing: dict[str, int]  # collective -> bytes
    failed: str | None = None


def compile_program(generation: programs.Generation, name: str, *, platform: str) -> Compiled:
    """Compile one program; an error becomes part of the result."""
    start = time.perf_counter()
    try:
        compiled = generation.compile(name, platform=platform)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return Compiled(None, time.perf_counter() - start, {}, reason)
    seconds = time.perf_counter() - start
    crossing = executed_collective_bytes(compiled.as_text()) if generation.es.mesh is not None else {}
    return Compiled(programs.usage(compiled), seconds, crossing)


def update_rows(config: Memory) -> dict[str, Any]:
    """Compile the update for the CPU with every precision and optimizer."""
    weights = jnp.dtype(config.weights)
    work = (
        models.mlp(layers=2, width=64, hidden=128, vocab=256, weights=weights) if config.small else models.mlp(weights=weights)
    )
    print(f"{work.num_params:,} {weights} parameters, {config.members} members; GB of the update")
    columns = ("parameters", "state", "temporaries", "peak", "/ parameters", "/ state", "seconds")
    print(f"{'precision and optimizer':<26}" + "".join(f"{column:>14}" for column in columns), flush=True)
    rows: dict[str, Any] = {}
    for precision in config.precisions:
        rounding = eggroll.Feedback() if precision == "feedback" else precision
        for name in config.optimizers if precision != "feedback" else ("sgd",):
            optimizer = optimizers.OPTIMIZERS[name]
            generation = programs.make_generation(work, members=config.members, optimizer=optimizer, precision=rounding)
            compiled = compile_program(generation, "update", platform="cpu")
            rows[f"{precision}_{name}"] = row = _update_row(generation, compiled)
            print(f"{precision + ' + ' + name:<26}" + _update_line(row), flush=True)
    return rows


def _update_row(generation: programs.Generation, compiled: Compiled) -> dict[str, Any]:
    state = generation.state
    params = programs.tree_bytes(state.params)
    whole = params + programs.tree_bytes((state.opt_state, state.masters))
    row: dict[str, Any] = {"parameter_bytes": params, "state_bytes": whole, "seconds": compiled.seconds}
    if compiled.usage is None:
        return row | {"ratio": None, "state_ratio": None, "failed": compiled.failed}
    peak = compiled.usage.peak
    return row | {"ratio": peak / params, "state_ratio": peak / whole, "peak_bytes": peak, **compiled.usage._asdict()}


def _update_line(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"  {row['failed']}"
    bytes_of = (row["parameter_bytes"], row["state_bytes"], row["temporaries"], row["peak_bytes"])
    numbers = [f"{size / GIGA:>14.3f}" for size in bytes_of]
    return "".join(numbers) + f"{row['ratio']:>14.2f}{row['state_ratio']:>14.2f}{row['seconds']:>14.1f}"


def device_rows(config: Memory) -> dict[str, Any]:
    """Compile every program of a generation of the decoders for one H100."""
    (device,) = described.h100s(1)
    print(f"{config.members} members of one token, stochastic + sgd; GB on one H100")
    print_header("model")
    rows: dict[str, Any] = {}
    for name in chosen_models(config):
        with described.traced_for_hopper():
            generation = make_decoder_generation(config, name, device=device)
            compiled = {program: compile_program(generation, program, platform="cuda") for program in PROGRAMS}
        rows[name] = row = generation_row(generation, compiled)
        print_row(name, row)
    return rows


def mesh_rows(config: Memory) -> dict[str, Any]:
    """Compile every program of a generation of the decoders for meshes of eight devices; bytes of one device."""
    on_gpu = config.target == "h100x8"
    devices = described.h100s(8) if on_gpu else jax.devices()
    print(f"{config.members} members of one token, stochastic + sgd; GB of one device of eight, GB that cross (predicted)")
    print_header("model and mesh", crossing=True)
    rows: dict[str, Any] = {}
    for name in chosen_models(config):
        for population, model in MESHES:
            mesh = described.mesh_of(devices, population=population, model=model)
            with described.traced_for_hopper() if on_gpu else contextlib.nullcontext():
                generation = make_decoder_generation(config, name, mesh=mesh)
                platform = "cuda" if on_gpu else "cpu"
                compiled = {program: compile_program(generation, program, platform=platform) for program in PROGRAMS}
            row = generation_row(generation, compiled) | crossing_row(config, generation, compiled)
            rows[f"{name}, population {population}, model {model}"] = row
            print_row(f"{name}, {population} x {model}", row)
    return rows


def make_decoder_generation(config: Memory, name: str, *, device: Any = None, mesh: Any = None) -> programs.Generation:
    """Make the generation of a decoder, stochastic rounding and plain SGD; on a mesh with "model" its layers are split."""
    work = models.decoder(models.sized(name, config.layers), members=config.members)
    return programs.make_generation(
        work,
        members=config.members,
        optimizer=optimizers.OPTIMIZERS["sgd"],
        precision="stochastic",
        implementation=None if config.implementation == "auto" else config.implementation,
        device=device,
        mesh=mesh,
        specs=models.decoder_specs(work.params),
    )


def generation_row(generation: programs.Generation, compiled: dict[str, Compiled]) -> dict[str, Any]:
    """Peaks in GB; the generation's is the largest of its programs', overhead is relative to plain inference."""
    peaks = {name: None if found.usage is None else found.usage.peak / GIGA for name, found in compiled.items()}
    plain, evaluate, update = (peaks[name] for name in PROGRAMS)
    peak = None if evaluate is None or update is None else max(evaluate, update)
    overhead = None if peak is None or plain is None else peak / plain
    row: dict[str, Any] = {f"{name}_gb": size for name, size in peaks.items()}
    row |= {"peak_gb": peak, "overhead": overhead, "implementation": generation.implementation}
    row |= {"parameters": sum(leaf.size for leaf in jax.tree.leaves(generation.state.params))}
    row |= {"seconds": {name: found.seconds for name, found in compiled.items()}}
    row |= {"usage": {name: found.usage._asdict() for name, found in compiled.items() if found.usage}}
    return row | {"failed": {name: found.failed for name, found in compiled.items() if found.failed}}


def crossing_row(config: Memory, generation: programs.Generation, compiled: dict[str, Compiled]) -> dict[str, Any]:
    """Bytes that cross, next to the cost model of docs/scaling.md and the activations of an ideal split over "model"."""
    shape, params = generation.es.mesh.shape, generation.state.params
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    layers, width = params["blocks"]["attention_norm"].shape
    activations = (2 * layers + 1) * config.members // shape["population"] * width * 2  # bfloat16, one token
    over_population = shape["population"] > 1
    predicted = {
        "plain": activations,
        "evaluate": activations + (4 * config.members if over_population else 0),
        "update": 4 * count // shape["model"] if over_population else 0,
    }
    return {"crossing": {name: found.crossing for name, found in compiled.items()}, "predicted_crossing": predicted}


def print_header(title: str, *, crossing: bool = False) -> None:
    """Print the names of the columns."""
    columns = ("plain", "evaluate", "update", "peak", "overhead", "seconds")
    extra = tuple(f"{name} crosses" for name in PROGRAMS) if crossing else ()
    print(
        f"{title:<18}" + "".join(f"{column:>10}" for column in columns) + "".join(f"{name:>18}" for name in extra), flush=True
    )


def print_row(name: str, row: dict[str, Any]) -> None:
    """Print one generation; bytes that cross are followed by the predicted ones."""
    numbers = [row[f"{program}_gb"] for program in (*PROGRAMS, "peak")] + [row["overhead"], sum(row["seconds"].values())]
    line = f"{name:<18}" + "".join(f"{'-' if value is None else f'{value:.2f}':>10}" for value in numbers)
    for program, predicted in row.get("predicted_crossing", {}).items():
        crossed = "-" if program in row["failed"] else f"{sum(row['crossing'][program].values()) / GIGA:.3f}"
        line += f"{f'{crossed} ({predicted / GIGA:.3f})':>18}"
    print(f"{line}  {row['implementation']}", flush=True)
    for program, reason in row["failed"].items():
        print(f"  {program} failed: {reason}", flush=True)
