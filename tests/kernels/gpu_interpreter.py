"""Run a Mosaic GPU kernel on CPU in JAX's GPU interpreter, and lower one for CUDA without a GPU.

The interpreter simulates shared memory, barriers and warpgroups by threads, and watches for races. It is private in the JAX
version that is pinned, and does not know transposed operands of wgmma, which Hopper's tensor cores read as they are: they are
taught here.
"""

import contextlib
import os
import threading
import traceback

import jax
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams, force_gpu_interpret_mode

_operands = threading.local()
_wgmma = gpu_callbacks.wgmma


class _Numpy:
    """numpy, but a product transposes the operands that this thread's wgmma reads transposed."""

    def __getattr__(self, name):
        return getattr(np, name)

    @staticmethod
    def matmul(a, b, dtype):
        a, b = (x.T if turned else x for x, turned in zip((a, b), _operands.turned, strict=True))
        return np.matmul(a.astype(dtype), b.astype(dtype))


def _is_transposed(transform) -> bool:
    return type(transform).__name__ == "TransposeTransform"


def _wgmma_of_transposed(*, a_transforms, b_transforms, **options):
    given = a_transforms, b_transforms
    _operands.turned = [any(map(_is_transposed, transforms)) for transforms in given]
    a, b = (tuple(t for t in transforms if not _is_transposed(t)) for transforms in given)
    try:
        return _wgmma(a_transforms=a, b_transforms=b, **options)
    except Exception:  # the other threads would wait for this one for ever
        traceback.print_exc()
        os._exit(1)


@contextlib.contextmanager
def interpreted():
    """Kernels traced in this context run in the interpreter."""
    gpu_callbacks.wgmma, gpu_callbacks.np = _wgmma_of_transposed, _Numpy()
    try:
        with force_gpu_interpret_mode(InterpretGPUParams(detect_races=True)):
            yield
    finally:
        gpu_callbacks.wgmma, gpu_callbacks.np = _wgmma, np
        gpu_callbacks.reset_gpu_interpret_mode_state()


def lowered_for_cuda(function, *args) -> str:
    """The program that `function` becomes on a GPU."""
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
