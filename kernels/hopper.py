"""The GPU that the kernels are for, what it holds, and which implementation of an operation runs.

Hopper only: a warpgroup of 128 threads owns 64 rows of a product (wgmma), and a program has 227 KiB of shared memory.
"""

import importlib.util
from collections.abc import Callable

import jax

IMPLEMENTATIONS = ("reference", "mosaic_gpu")
ROWS = 64  # of one warpgroup's product
STEP = 64  # contracted at a time
SHARED_MEMORY = 227 * 1024  # bytes
SMS = 132  # multiprocessors of an H100: programs that run at once, where there is no device to ask


def check_device() -> None:
    """Raise NotImplementedError unless the default device can run these kernels."""
    if importlib.util.find_spec("jax.experimental.pallas.mosaic_gpu") is None:
        raise NotImplementedError(f"implementation 'mosaic_gpu' needs Pallas with Mosaic GPU, jax {jax.__version__} has none.")
    if jax.default_backend() != "gpu":
        raise NotImplementedError(f"implementation 'mosaic_gpu' needs a GPU, the default backend is {jax.default_backend()}.")
    capability = str(jax.devices()[0].compute_capability)
    if capability != "9.0":
        raise NotImplementedError(
            f"implementation 'mosaic_gpu' needs a Hopper GPU (compute capability 9.0, its wgmma), this one has {capability}."
        )


def programs() -> int:
    """Programs that run at once: the multiprocessors of the default GPU."""
    return jax.devices()[0].core_count if jax.default_backend() == "gpu" else SMS


def choose_implementation(op: str, implementation: str | None, check: Callable[[], None], *, config: object = None) -> str:
    """The implementation of an operation that runs.

    Args:
        op: its name, for messages.
        implementation: "reference", "mosaic_gpu", or None: the kernel where it can run, else the reference.
        check: raises NotImplementedError unless the kernel covers the operands.
        config: tiles of the kernel, or None.

    Raises:
        NotImplementedError: a named implementation that cannot run here, or does not cover the operands.
        ValueError: an unknown implementation, or tiles for the reference.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation of {op} must be None or one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}.")
    if implementation == "reference":
        if config is not None:
            raise ValueError(f"config of {op} has no effect with implementation 'reference': its tiles are the kernel's.")
        return implementation
    try:
        check_device()
        check()
    except NotImplementedError:
        if implementation is None:
            return "reference"
        raise
    return "mosaic_gpu"


def stages_that_fit(op: str, *, stage: int, rest: int, most: int) -> int:
    """How many stages of `stage` bytes fit in shared memory next to `rest` bytes, at most `most`.

    Raises:
        NotImplementedError: not even one.
    """
    if stage + rest > SHARED_MEMORY:
        raise NotImplementedError(
            f"{op} 'mosaic_gpu' needs {stage + rest:,} bytes of shared memory, {SHARED_MEMORY:,} are there."
        )
    return min(most, (SHARED_MEMORY - rest) // stage)
