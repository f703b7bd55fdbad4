"""H100s that are only described: XLA compiles for them on a machine without a GPU or a driver.

`h100.txtpb` is the description that XLA asks for. The packages of the compiler are those of `make cuda-compiler`.
"""

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from eggroll.kernels import hopper

DESCRIPTION = Path(__file__).with_name("h100.txtpb")
PACKAGES = ("jax_cuda12_plugin", "nvidia.cuda_nvcc")


def check_compiler(command: str = "bench memory --target h100") -> None:
    """Exit with a clear error where the compiler for CUDA is not installed."""
    missing = [name for name in PACKAGES if not is_installed(name)]
    if missing:
        raise SystemExit(
            f"error: compiling for an H100 needs the packages {' and '.join(missing)}, which are not installed. "
            f"`make cuda-compiler` installs them; then run .venv-cuda/bin/python -m experiments.{command}"
        )


def is_installed(name: str) -> bool:
    """Whether a package can be imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def h100s(count: int) -> list[jax.Device]:
    """Return described H100s of one machine."""
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="cuda", target_config=DESCRIPTION.read_text(), topology=f"1x1x{count}")
    return list(topology.devices)


class HostSharding(NamedSharding):
    """A sharding in the host's memory. A described device knows of no memories, so that `NamedSharding` loses the kind."""

    memory_kind = "pinned_host"


def compile_program(
    function: Any, shapes: tuple[Any, ...], *, platform: str = "cuda", options: dict[str, Any] | None = None
) -> Any:
    """Compile a jitted function for the devices, possibly described ones, that its shapes lie on.

    Args:
        function: from `jax.jit`.
        shapes: of its arguments.
        platform: of the devices, "cuda" or "cpu".
        options: further options of XLA.
    """
    lowered = function.trace(*shapes).lower(lowering_platforms=(platform,))
    untimed = {"xla_gpu_autotune_level": 0} if platform == "cuda" else {}  # no device to time candidates on
    chosen = untimed | (options or {})
    with mock.patch.object(HostSharding, "memory_kind", None):  # what jax expects to be told by the compiler
        return lowered.compile(compiler_options=chosen)


def mesh_of(devices: list[jax.Device], *, population: int, model: int) -> Mesh:
    """Return a mesh with the axes "population" and "model"."""
    return Mesh(np.array(devices).reshape(population, model), ("population", "model"))


@contextlib.contextmanager
def traced_for_hopper() -> Iterator[None]:
    """Trace as on a machine with an H100, where the engine chooses other forms of its products than on a CPU."""
    with (
        mock.patch.object(jax, "default_backend", lambda: "gpu"),
        mock.patch.object(hopper, "check_device", lambda: None),
        mock.patch.object(hopper, "programs", lambda: hopper.SMS),
    ):
        yield
