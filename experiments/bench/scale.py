"""One generation over meshes of devices: bytes that cross, differences to one device, memory per device.

A shared batch, an MLP of three hidden layers, SGD with momentum (Adam turns gradient entries that cancel up to rounding into
full steps, which would hide how close two gradients are). Every mesh runs the same generation as one device; the bytes are read
from the compiled program and compared with the cost model (docs/scaling.md). Without enough devices the benchmark restarts
itself with virtual CPU devices, which say nothing about speed, so no time is reported. A collective in the loop over chunks
counts once; only the partitioner's collectives, with "model", are there.
"""

import dataclasses
import os
import subprocess
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import eggroll
from eggroll.experiments.bench.collectives import collective_bytes
from eggroll.experiments.bench.timing import machine
from eggroll.experiments.common.run import print_summary


@dataclasses.dataclass(frozen=True)
class Scale:
    """Compare a generation over meshes of devices with the same generation on one device."""

    devices: int = 8
    """Devices of a mesh, a multiple of 2; virtual ones if the machine has fewer."""
    members: int = 256
    """Members of the population."""
    width: int = 256
    """Width of the hidden layers."""
    examples: int = 64
    """Examples of the batch."""
    chunk_size: int = 16
    """Members that a device evaluates at once."""
    growths: tuple[int, ...] = (1, 4, 16)
    """Multiples of the population whose memory is compared."""


def run(config: Scale) -> None:
    """Run the benchmark; the last line of standard output is JSON."""
    if config.devices < 2 or config.devices % 2:
        raise SystemExit(f"error: devices must be a multiple of 2, got {config.devices}.")
    if jax.device_count() < config.devices:
        raise SystemExit(_run_on_virtual_devices(config))
    about = machine()
    print("  ".join(f"{key} {value}" for key, value in about.items()))
    params, batch = _make_workload(config)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{config.members} members, {size:,} parameters, {config.examples} examples, chunks of {config.chunk_size} members")
    es, state = _make_strategy(config, params, mesh=None)
    alone = _run_generation(_compile(es, state, batch), state, batch)
    print(f"{'mesh':<34}{'bytes crossing':>16}{'cost model':>12}{'fitness diff':>14}{'update diff':>13}{'device bytes':>14}")
    rows = {}
    for name, (mesh, shard_optimizer) in _meshes(config).items():
        rows[name] = row = _compare(config, params, batch, alone, mesh=mesh, shard_optimizer=shard_optimizer)
        numbers = f"{row['collective_total']:>16,}{row['predicted_bytes'] or '-':>12}{row['fitness_difference']:>14.1e}"
        print(f"{name:<34}{numbers}{row['update_difference']:>13.1e}{row['peak_bytes']:>14,}", flush=True)
    first = next(iter(_meshes(config).values()))[0]
    memory = {}
    for growth in config.growths:
        larger = dataclasses.replace(config, members=growth * config.members)
        memory[larger.members] = peak = _peak_bytes(_compile(*_make_strategy(larger, params, mesh=first), batch))
        print(f"{larger.members:>7} members: {peak:,} bytes a device")
    worst = {key: max(row[key] for row in rows.values()) for key in ("update_difference", "fitness_difference")}
    bytes_of = {name: row["collective_bytes"] for name, row in rows.items()}
    summary = {"devices": config.devices, "collective_bytes": bytes_of, **worst, "peak_bytes": memory, "meshes": rows}
    print_summary(summary | {"parameters": size, "members": config.members, "about": about})


def _run_on_virtual_devices(config: Scale) -> int:
    """Run in a new process whose JAX sees the devices; return its exit status."""
    code = f"from eggroll.experiments.bench import scale; scale.run(scale.{config!r})"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={config.devices}"
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    ).returncode


class _MLP(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(3):
            x = nn.tanh(nn.Dense(self.width)(x))
        return nn.Dense(8)(x)


def _make_workload(config: Scale) -> tuple[Any, Any]:
    x = jax.random.normal(jax.random.key(1), (config.examples, config.width))
    return _MLP(config.width).init(jax.random.key(0), x[:1]), (x, jnp.sin(x[:, :8]))


def _meshes(config: Scale) -> dict[str, tuple[Mesh, bool]]:
    """Name -> mesh, and whether the optimizer state is sharded."""

    def mesh(*shape: int, names: tuple[str, ...]) -> Mesh:
        return Mesh(np.array(jax.devices()[: config.devices]).reshape(shape), names)

    half, whole = config.devices // 2, mesh(config.devices, names=("population",))
    return {
        f"population {config.devices}": (whole, False),
        f"population {config.devices}, shard_optimizer": (whole, True),
        f"population {half}, data 2": (mesh(half, 2, names=("population", "data")), False),
        f"population {half}, model 2": (mesh(half, 2, names=("population", "model")), False),
    }


def _make_strategy(config: Scale, params: Any, *, mesh: Mesh | None, shard_optimizer: bool = False) -> tuple[Any, Any]:
    """Make a strategy and its initial state."""

    def fitness(params: Any, batch: Any, key: jax.Array) -> jax.Array:
        outputs: Any = _MLP(config.width).apply(params, batch[0])
        return -jnp.mean((outputs - batch[1]) ** 2)

    if mesh is not None and "model" in mesh.axis_names:
        columns = lambda leaf: PartitionSpec(*[None] * (leaf.ndim - 1), "model")  # noqa: E731
        params = jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, columns(leaf))), params)
    es = eggroll.EvolutionStrategy(
        fitness,
        population_size=config.members,
        sigma=0.02,
        optimizer=optax.sgd(1e-3, momentum=0.9),
        chunk_size=config.chunk_size,
        mesh=mesh,
        shard_optimizer=shard_optimizer,
    )
    return es, es.init(params, key=jax.random.key(2))


def _compile(es: Any, state: Any, batch: Any) -> Any:
    """Compile a whole generation as one program, in the memory of the state."""
    es.plan(state, batch)
    return jax.jit(es.step, donate_argnums=0).lower(state, batch).compile()


def _run_generation(compiled: Any, state: Any, batch: Any) -> tuple[Any, Any]:
    """Run one generation; return parameters and fitness on the host."""
    state, metrics = compiled(state, batch)
    return jax.device_get((state.params, metrics.fitness))


def _compare(
    config: Scale, params: Any, batch: Any, alone: tuple[Any, Any], *, mesh: Mesh, shard_optimizer: bool
) -> dict[str, Any]:
    """Measure one mesh: bytes, their prediction, differences to one device, memory."""
    es, state = _make_strategy(config, params, mesh=mesh, shard_optimizer=shard_optimizer)
    compiled = _compile(es, state, batch)
    crossing = collective_bytes(compiled.as_text())
    weights, fitness = _run_generation(compiled, state, jax.device_put(batch, compiled.input_shardings[0][1]))
    return {
        "collective_bytes": crossing,
        "collective_total": sum(crossing.values()),
        "predicted_bytes": _predict_bytes(config, mesh, params),
        "fitness_difference": _relative_difference(fitness, alone[1]),
        "update_difference": _relative_difference(weights, alone[0]),
        "peak_bytes": _peak_bytes(compiled),
    }


def _predict_bytes(config: Scale, mesh: Mesh, params: Any) -> int | None:
    """Apply the cost model of docs/scaling.md: sizes of the collectives' results. None: the partitioner's ("model")."""
    if "model" in mesh.axis_names:
        return None
    crossing = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))  # the gradient, or with shard_optimizer the parameters
    over_population, over_data = (mesh.shape.get(axis, 1) for axis in ("population", "data"))
    averaged = 4 * config.members // over_population if over_data > 1 else 0
    return 4 * config.members + averaged + crossing


def _relative_difference(tree: Any, reference: Any) -> float:
    """The largest difference of a leaf, relative to its largest entry."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(reference), strict=True)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


def _peak_bytes(compiled: Any) -> int:
    """Arguments, results that are not in their memory, and temporary memory of one device."""
    memory = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + results + memory.temp_size_in_bytes
