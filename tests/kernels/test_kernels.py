"""Every kernel against a float64 oracle of built members: the reference, and the Mosaic GPU kernel interpreted and lowered.

tolerance of a floating product: x left^T is rounded to bfloat16, 2^-9 of itself, and the result once more; both are at most
4.5 standard deviations of unit size here, so 2 * 4.5 * 2^-9 + sums in float32
"""

import functools
import json
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import pytest

from eggroll.kernels import hopper
from eggroll.kernels.factors import SignKeys, Values, signs_of, values_of
from eggroll.kernels.int8_dot import config as int8_config
from eggroll.kernels.int8_dot.api import int8_dot
from eggroll.kernels.int8_dot.cases import MEASURED as INT8_MEASURED
from eggroll.kernels.int8_dot.cases import TESTED as INT8_CASES
from eggroll.kernels.int8_dot.config import digits
from eggroll.kernels.lowrank_dot.api import lowrank_dot
from eggroll.kernels.lowrank_dot.cases import MEASURED as DOT_MEASURED
from eggroll.kernels.lowrank_dot.cases import TESTED as DOT_CASES
from eggroll.kernels.lowrank_update.api import lowrank_update
from eggroll.kernels.lowrank_update.cases import MEASURED as UPDATE_MEASURED
from eggroll.kernels.lowrank_update.cases import TESTED as UPDATE_CASES
from eggroll.noise import addresses as addresses
from eggroll.noise import integer
from tests.kernels import kernel_cases
from tests.tables import slow

gpu_interpreter = pytest.importorskip("tests.kernels.gpu_interpreter", reason="this jax has no GPU interpreter of this form")
ROOT = Path(__file__).parents[2]
by_name = functools.partial(pytest.mark.parametrize, "case", ids=lambda case: case.name)


def some(cases, *names):
    """Rows of all cases; those that are not named are slow."""
    assert {*names} <= {case.name for case in cases}
    return by_name(argvalues=[case if case.name in names else slow(case) for case in cases])


@pytest.fixture
def on_hopper(monkeypatch):
    """Let kernels be traced here: two programs instead of a GPU's."""
    monkeypatch.setattr(hopper, "check_device", lambda: None)
    monkeypatch.setattr(hopper, "programs", lambda: 2)


@some(DOT_CASES, "values-inside", "int8-inside", "rank-3-padded-terms")
def test_reference_dot(case):
    kernel_cases.check_dot(case, jax.jit(kernel_cases.run_dot(case, "reference"))(*kernel_cases.float_operands(case)))


@some(UPDATE_CASES, "values", "keys-padded")
def test_reference_update(case):
    kernel_cases.check_update(
        case, jax.jit(kernel_cases.run_update(case, "reference"))(*kernel_cases.update_operands(case)), 2.0**-20
    )


@some(INT8_CASES, "totals", "four-digits")
def test_reference_product(case):
    kernel_cases.check_product(case, jax.jit(kernel_cases.run_product(case, "reference"))(*kernel_cases.integer_operands(case)))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["dot", "update", "product", "engine"])
def test_interpreted(what):
    """In a process of its own (`kernel_runs`)."""
    command = [sys.executable, "-m", "tests.kernels.kernel_runs", what]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    outcomes = json.loads(run.stdout.splitlines()[-1])
    assert outcomes and not {name: error for name, error in outcomes.items() if error}


def shapes(operands):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), operands)


@pytest.mark.slow
@by_name(argvalues=DOT_CASES + DOT_MEASURED)
def test_dot_lowers_for_cuda(case, on_hopper):
    operands = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, kernel_cases.float_operands(case)))
    assert "mosaic_gpu" in gpu_interpreter.lowered_for_cuda(kernel_cases.run_dot(case, "mosaic_gpu"), *operands)


@pytest.mark.slow
@by_name(argvalues=UPDATE_CASES + UPDATE_MEASURED)
def test_update_lowers_for_cuda(case, on_hopper):
    operands = jax.eval_shape(lambda: kernel_cases.update_operands(case))
    assert "mosaic_gpu" in gpu_interpreter.lowered_for_cuda(kernel_cases.run_update(case, "mosaic_gpu"), *operands)


@pytest.mark.slow
@by_name(argvalues=UPDATE_CASES)
def test_step_lowers_for_cuda(case, on_hopper):
    operands = jax.eval_shape(lambda: kernel_cases.step_operands(case))
    assert "mosaic_gpu" in gpu_interpreter.lowered_for_cuda(kernel_cases.run_step(case, "mosaic_gpu"), *operands)


@some(INT8_CASES + INT8_MEASURED, "totals", "rescaled")
def test_product_lowers_for_cuda(case, on_hopper):
    operands = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, kernel_cases.integer_operands(case)))
    assert "mosaic_gpu" in gpu_interpreter.lowered_for_cuda(kernel_cases.run_product(case, "mosaic_gpu"), *operands)


@pytest.mark.gpu
@by_name(argvalues=DOT_CASES)
def test_compiled_dot(case):
    kernel_cases.check_dot(case, jax.jit(kernel_cases.run_dot(case, "mosaic_gpu"))(*kernel_cases.float_operands(case)))


@pytest.mark.gpu
@by_name(argvalues=UPDATE_CASES)
def test_compiled_update(case):
    kernel_cases.check_update(
        case, jax.jit(kernel_cases.run_update(case, "mosaic_gpu"))(*kernel_cases.update_operands(case)), kernel_cases.HALF
    )


@pytest.mark.gpu
@by_name(argvalues=INT8_CASES)
def test_compiled_product(case):
    kernel_cases.check_product(
        case, jax.jit(kernel_cases.run_product(case, "mosaic_gpu"))(*kernel_cases.integer_operands(case))
    )


def test_signs_are_those_of_the_library():
    rank, m, n = 2, 64, 128
    keys = jax.random.bits(jax.random.key(7), (5, 2), jnp.uint32)
    words = addresses.draw_words([keys], [rank * (m + n) // 32])[0]
    chex.assert_trees_all_equal(signs_of(SignKeys(keys), rank * (m + n)).words, words)
    factors = addresses.decode_factors(words, rank=rank, m=m, n=n, distribution="rademacher", dtype=jnp.float32)
    drawn = values_of(SignKeys(keys), rank=rank, rows=m, columns=n, dtype=jnp.float32)
    chex.assert_trees_all_equal(tuple(drawn), factors.unpack(jnp.float32))


def test_kernels_know_the_largest_integer_factor():
    assert integer.largest_factor("normal") == int8_config.LARGEST_FACTOR


def test_digits_hold_the_largest_sum():
    for m in (1, 2, 16, 1106, 1107, 1111, 70_000):
        held = 127 * (256 ** digits(m) - 1) // 255
        assert held >= 128 * 59 * m
        assert digits(m) == 1 or 127 * (256 ** (digits(m) - 1) - 1) // 255 < 128 * 59 * m


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=jnp.float32), "takes bfloat16 x and w, got float32"),
        (dict(m=96), "sizes that are multiples of 64, got w of 96 x 64"),
        (dict(rank=17), "takes ranks 1 to 16, got 17"),
        (dict(factors=jnp.float32), "reads factors of bfloat16 or int8, got float32"),
    ],
)
def test_named_kernel_names_what_it_does_not_cover(change, message, on_hopper):
    m, rank = change.get("m", 64), change.get("rank", 1)
    x, w = jnp.zeros((2, 2, m), change.get("x", jnp.bfloat16)), jnp.zeros((m, 64), jnp.bfloat16)
    noise = Values(*(jnp.zeros((2, rank, size), change.get("factors", jnp.bfloat16)) for size in (m, 64)))
    with pytest.raises(NotImplementedError, match=message):
        lowrank_dot(x, w, noise, scale=jnp.zeros((2, 2)), rank=rank, implementation="mosaic_gpu")


def test_update_and_integer_kernel_name_what_they_do_not_cover(on_hopper):
    signs = SignKeys(jnp.zeros((2, 2), jnp.uint32))
    with pytest.raises(NotImplementedError, match="rows in multiples of 128 and columns of 64, got 64 x 64"):
        lowrank_update(jnp.zeros(2), signs, rank=1, rows=64, columns=64, implementation="mosaic_gpu")
    x, w, factors = (
        jnp.zeros((2, 2, 64), jnp.int8),
        jnp.zeros((64, 64), jnp.int8),
        Values(*[jnp.zeros((2, 1, 64), jnp.int8)] * 2),
    )
    with pytest.raises(NotImplementedError, match="rows in multiples of 128 and columns of 64, got 64 x 64"):
        int8_dot(x, w, factors, sign=jnp.ones((2, 2), jnp.int32), bits=8, implementation="mosaic_gpu")


def test_named_kernel_needs_its_gpu_and_none_takes_the_reference():
    case = DOT_CASES[0]
    operands = kernel_cases.float_operands(case)
    if jax.default_backend() != "gpu":
        with pytest.raises(NotImplementedError, match="needs a GPU, the default backend is cpu"):
            kernel_cases.run_dot(case, "mosaic_gpu")(*operands)
    chex.assert_trees_all_equal(kernel_cases.run_dot(case, None)(*operands), kernel_cases.run_dot(case, "reference")(*operands))
    with pytest.raises(ValueError, match="must be None or one of reference, mosaic_gpu, got 'triton'"):
        kernel_cases.run_dot(case, "triton")(*operands)


def test_old_gpu_is_refused(monkeypatch):
    class Device:
        compute_capability = "8.0"

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    with pytest.raises(NotImplementedError, match=r"needs a Hopper GPU .* this one has 8\.0"):
        hopper.check_device()


def test_too_little_shared_memory_is_an_error():
    with pytest.raises(NotImplementedError, match="needs 300,000 bytes of shared memory, 232,448 are there"):
        hopper.stages_that_fit("lowrank_dot", stage=100_000, rest=200_000, most=4)
