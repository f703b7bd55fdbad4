"""Kernels in JAX's GPU interpreter, in a process of its own; `test_kernels.py` starts it and judges what it prints.

The interpreter runs every warpgroup in a thread that waits for the others: XLA needs more threads than this machine may have
cores, and one that fails would leave the others waiting. A line of JSON: name of the case -> null or what was wrong.
"""

import faulthandler
import functools
import json
import os
import sys
import traceback

os.environ["NPROC"] = "8"  # XLA's threads
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np

from eggroll.kernels import hopper
from eggroll.kernels.int8_dot.cases import TESTED as INT8_CASES
from eggroll.kernels.lowrank_dot.cases import TESTED as DOT_CASES
from eggroll.kernels.lowrank_update.cases import TESTED as UPDATE_CASES
from tests.kernels import kernel_cases, kernel_models
from tests.kernels.gpu_interpreter import interpreted


def dot_run(case) -> None:
    kernel_cases.check_dot(case, jax.jit(kernel_cases.run_dot(case, "mosaic_gpu"))(*kernel_cases.float_operands(case)))


def wrong_sign_run() -> None:
    x, w, noise, scale = kernel_cases.float_operands(DOT_CASES[0])
    out = jax.jit(kernel_cases.run_dot(DOT_CASES[0], "mosaic_gpu"))(x, w, noise, -scale)
    try:
        kernel_cases.check_dot(DOT_CASES[0], out)
    except AssertionError:
        return
    raise AssertionError("the check does not see a wrong sign")


def update_run(case) -> None:
    out = jax.jit(kernel_cases.run_update(case, "mosaic_gpu"))(*kernel_cases.update_operands(case))
    kernel_cases.check_update(case, out, kernel_cases.HALF)


def step_run(case) -> None:
    """The same as the reference to the last bit, but where the sum falls on the other side of a random word."""
    operands = kernel_cases.step_operands(case)
    out, expected = (jax.jit(kernel_cases.run_step(case, which))(*operands) for which in ("mosaic_gpu", "reference"))
    kernel_cases.check_step(case, out)
    moved = np.mean(np.asarray(out) != np.asarray(expected))
    assert moved < 0.04, moved  # weights are rounded to bfloat16; under another key it is above 0.3


def product_run(case) -> None:
    out = jax.jit(kernel_cases.run_product(case, "mosaic_gpu"))(*kernel_cases.integer_operands(case))
    kernel_cases.check_product(case, out)


def floats_run() -> None:
    """A generation by the kernels and one by the reference: the same fitness and step, up to bfloat16's rounding."""
    fitness, steps = zip(*(kernel_models.generation(which) for which in ("reference", "mosaic_gpu")), strict=True)
    np.testing.assert_allclose(*fitness, rtol=0.03, atol=0.03)
    for reference, kernel in zip(*map(jax.tree.leaves, steps), strict=True):
        difference, size = jnp.linalg.norm(reference - kernel), jnp.linalg.norm(reference)
        assert difference < 0.05 * size, f"{difference} of {size}"


def other_noise_run() -> None:
    """The negative control of `floats_run`: another key gives another step."""
    steps = [kernel_models.generation("reference", seed=seed)[1] for seed in (1, 2)]
    for one, other in zip(*map(jax.tree.leaves, steps), strict=True):
        assert jnp.linalg.norm(one - other) > 0.5 * jnp.linalg.norm(one)


def integers_run() -> None:
    """A generation of an int8 model: the same to the last bit."""
    reference, kernel = (kernel_models.integer_generation(which) for which in ("reference", "mosaic_gpu"))
    for one, other in zip(jax.tree.leaves(reference), jax.tree.leaves(kernel), strict=True):
        np.testing.assert_array_equal(one, other)


RUNS = {
    "dot": {**{case.name: functools.partial(dot_run, case) for case in DOT_CASES}, "wrong-sign": wrong_sign_run},
    "update": {case.name: functools.partial(update_run, case) for case in UPDATE_CASES},
    "step": {case.name: functools.partial(step_run, case) for case in UPDATE_CASES[1:3]},
    "product": {case.name: functools.partial(product_run, case) for case in INT8_CASES},
    "engine": {"floats": floats_run, "other-noise": other_noise_run, "integers": integers_run},
}


def outcome(run) -> str | None:
    try:
        with interpreted():
            run()
    except Exception:
        return traceback.format_exc()
    return None


if __name__ == "__main__":
    faulthandler.dump_traceback_later(500, exit=True)
    hopper.check_device, hopper.programs = (lambda: None), (lambda: 2)
    print(json.dumps({name: outcome(run) for name, run in RUNS[sys.argv[1]].items()}))
