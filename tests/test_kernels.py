"""Every kernel against a float64 oracle of built members: the reference, and the Mosaic GPU kernel interpreted and lowered.

tolerance of a floating product: x left^T is rounded to bfloat16, 2^-9 of itself, and the result once more; both are at most
4.5 standard deviations of unit size here, so 2 * 4.5 * 2^-9 + sums in float32
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eggroll import noise as addresses
from kernels import hopper
from kernels.factors import SignKeys, Values, signs_of, values_of
from kernels.int8_dot.api import int8_dot
from kernels.int8_dot.cases import MEASURED as INT8_MEASURED
from kernels.int8_dot.cases import TESTED as INT8_CASES
from kernels.int8_dot.config import digits
from kernels.lowrank_dot.api import lowrank_dot
from kernels.lowrank_dot.cases import MEASURED as DOT_MEASURED
from kernels.lowrank_dot.cases import TESTED as DOT_CASES
from kernels.lowrank_update.api import lowrank_update
from kernels.lowrank_update.cases import MEASURED as UPDATE_MEASURED
from kernels.lowrank_update.cases import TESTED as UPDATE_CASES
from tests import kernel_cases

gpu_interpreter = pytest.importorskip("tests.gpu_interpreter", reason="this jax has no GPU interpreter of this form")
HALF = 2.0**-8  # of a unit in the last place of bfloat16, relative
by_name = functools.partial(pytest.mark.parametrize, "case", ids=lambda case: case.name)


@pytest.fixture
def on_hopper(monkeypatch):
    """Let kernels be traced here: two programs instead of a GPU's."""
    monkeypatch.setattr(hopper, "check_device", lambda: None)
    monkeypatch.setattr(hopper, "programs", lambda: 2)


def dot(case, implementation):
    def run(x, w, noise, scale):
        config = case.config if implementation == "mosaic_gpu" else None
        return lowrank_dot(x, w, noise, scale=scale, rank=case.rank, implementation=implementation, config=config)

    return run


def update(case, implementation):
    config = case.config if implementation == "mosaic_gpu" else None
    sizes = dict(rank=case.rank, rows=case.m, columns=case.n)
    return lambda coefficients, noise: lowrank_update(
        coefficients, noise, implementation=implementation, config=config, **sizes
    )


def product(case, implementation):
    config = case.config if implementation == "mosaic_gpu" else None
    options = dict(bits=case.bits, shift=case.shift, implementation=implementation, config=config)
    return lambda x, w, noise, sign: int8_dot(x, w, noise, sign=sign, **options)


def wide(array) -> np.ndarray:
    return np.asarray(array.astype(jnp.float32), np.float64)


def dot_oracle(case, x, w, noise, scale):
    """Every row through its own built matrix, and how far rounding may take the result from there."""
    built = kernel_cases.members(noise, rank=case.rank, m=case.m, n=case.n)
    x, w, scale = wide(x), wide(w), np.asarray(scale, np.float64)
    oracle = np.einsum("pjm,mn->pjn", x, w) + scale[..., None] * np.einsum("pjm,pmn->pjn", x, built)
    left, right = (wide(f) for f in values_of(noise, rank=case.rank, rows=case.m, columns=case.n, dtype=jnp.float32))
    hidden = np.abs(scale[..., None] * np.einsum("pjm,pkm->pjk", x, left))
    terms = np.einsum("pjk,pkn->pjn", hidden, np.abs(right))
    sums = np.einsum("pjm,mn->pjn", np.abs(x), np.abs(w)) + np.abs(scale)[..., None] * np.einsum(
        "pjm,pmn->pjn", np.abs(x), np.abs(built)
    )
    return oracle, HALF * (terms + np.abs(oracle) + HALF * terms) + case.m * 2.0**-24 * sums


def check_dot(case, out):
    operands = kernel_cases.float_operands(case)
    oracle, tolerance = dot_oracle(case, *operands)
    assert (np.abs(wide(out) - oracle) <= tolerance).all()
    without = np.einsum("pjm,mn->pjn", wide(operands[0]), wide(operands[1]))
    assert np.abs(without - oracle).max() > 10 * tolerance.max()  # the perturbation is there to be seen


def check_update(case, out, tolerance):
    coefficients, noise = kernel_cases.update_operands(case)
    built = kernel_cases.members(noise, rank=case.rank, m=case.m, n=case.n)
    oracle = np.tensordot(np.asarray(coefficients, np.float64), built, axes=1)
    assert np.abs(np.asarray(out, np.float64) - oracle).max() < tolerance * np.abs(coefficients).sum() * case.rank


def check_product(case, out):
    """Exact, by 64-bit integers."""
    x, w, noise, sign = (jax.tree.map(lambda a: np.asarray(a, np.int64), a) for a in kernel_cases.integer_operands(case))
    term = np.einsum("pjm,pkm,pkn->pjn", x, noise.left, noise.right, optimize=True)
    half = (1 << case.bits) >> 1
    rounded = np.sign(term) * ((np.abs(term) + half) >> case.bits)
    total = np.einsum("pjm,mn->pjn", x, w) + sign[..., None] * rounded
    if case.shift is not None:
        total = np.clip((total + (1 << case.shift >> 1)) >> case.shift, -127, 127)
    np.testing.assert_array_equal(np.asarray(out), total)


@by_name(argvalues=DOT_CASES)
def test_reference_dot(case):
    check_dot(case, jax.jit(dot(case, "reference"))(*kernel_cases.float_operands(case)))


@by_name(argvalues=UPDATE_CASES)
def test_reference_update(case):
    check_update(case, jax.jit(update(case, "reference"))(*kernel_cases.update_operands(case)), 2.0**-20)


@by_name(argvalues=INT8_CASES)
def test_reference_product(case):
    check_product(case, jax.jit(product(case, "reference"))(*kernel_cases.integer_operands(case)))


@pytest.mark.slow
@by_name(argvalues=DOT_CASES)
def test_interpreted_dot(case, on_hopper):
    with gpu_interpreter.interpreted():
        out = jax.jit(dot(case, "mosaic_gpu"))(*kernel_cases.float_operands(case))
        check_dot(case, out)


@pytest.mark.slow
@by_name(argvalues=UPDATE_CASES)
def test_interpreted_update(case, on_hopper):
    with gpu_interpreter.interpreted():  # weights are rounded to bfloat16
        check_update(case, jax.jit(update(case, "mosaic_gpu"))(*kernel_cases.update_operands(case)), HALF)


@pytest.mark.slow
@by_name(argvalues=INT8_CASES)
def test_interpreted_product(case, on_hopper):
    with gpu_interpreter.interpreted():
        check_product(case, jax.jit(product(case, "mosaic_gpu"))(*kernel_cases.integer_operands(case)))


def test_interpreter_sees_a_wrong_sign(on_hopper):
    case = DOT_CASES[0]
    with gpu_interpreter.interpreted():
        check_dot(case, jax.jit(dot(case, "mosaic_gpu"))(*kernel_cases.float_operands(case)))
    x, w, noise, scale = kernel_cases.float_operands(case)
    with gpu_interpreter.interpreted():
        out = jax.jit(dot(case, "mosaic_gpu"))(x, w, noise, -scale)
    with pytest.raises(AssertionError):
        check_dot(case, out)


def shapes(operands):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), operands)


@pytest.mark.slow
@by_name(argvalues=DOT_CASES + DOT_MEASURED)
def test_dot_lowers_for_cuda(case, on_hopper):
    operands = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, kernel_cases.float_operands(case)))
    assert "mosaic_gpu" in gpu_interpreter.lowered_for_cuda(dot(case, "mosaic_gpu"), *operands)


@pytest.mark.slow
@by_name(argvalues=UPDATE_CASES + UPDATE_MEASURED)
def test_update_lowers_for_cuda(case, on_hopper):
    operands = jax.eval_shape(lambda: kernel_cases.update_operands(case))
    assert "mosaic_gpu" in gpu_interpreter.lowered_for_cuda(update(case, "mosaic_gpu"), *operands)


@by_name(argvalues=INT8_CASES + INT8_MEASURED)
def test_product_lowers_for_cuda(case, on_hopper):
    operands = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, kernel_cases.integer_operands(case)))
    assert "mosaic_gpu" in gpu_interpreter.lowered_for_cuda(product(case, "mosaic_gpu"), *operands)


@pytest.mark.gpu
@by_name(argvalues=DOT_CASES)
def test_compiled_dot(case):
    check_dot(case, jax.jit(dot(case, "mosaic_gpu"))(*kernel_cases.float_operands(case)))


@pytest.mark.gpu
@by_name(argvalues=UPDATE_CASES)
def test_compiled_update(case):
    check_update(case, jax.jit(update(case, "mosaic_gpu"))(*kernel_cases.update_operands(case)), HALF)


@pytest.mark.gpu
@by_name(argvalues=INT8_CASES)
def test_compiled_product(case):
    check_product(case, jax.jit(product(case, "mosaic_gpu"))(*kernel_cases.integer_operands(case)))


def test_signs_are_those_of_the_library():
    rank, m, n = 2, 64, 128
    keys = jax.random.bits(jax.random.key(7), (5, 2), jnp.uint32)
    words = addresses.draw_words([keys], [rank * (m + n) // 32])[0]
    chex.assert_trees_all_equal(signs_of(SignKeys(keys), rank * (m + n)).words, words)
    factors = addresses.decode_factors(words, rank=rank, m=m, n=n, distribution="rademacher", dtype=jnp.float32)
    drawn = values_of(SignKeys(keys), rank=rank, rows=m, columns=n, dtype=jnp.float32)
    chex.assert_trees_all_equal(tuple(drawn), factors.unpacked(jnp.float32))


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
            dot(case, "mosaic_gpu")(*operands)
    chex.assert_trees_all_equal(dot(case, None)(*operands), dot(case, "reference")(*operands))
    with pytest.raises(ValueError, match="must be None or one of reference, mosaic_gpu, got 'triton'"):
        dot(case, "triton")(*operands)


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
