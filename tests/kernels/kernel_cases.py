"""The cases that kernels are tested and measured with: operands, the call, and what it has to give by a float64 oracle.

A floating product may be off by what bfloat16 rounds, 2^-8 of x left^T and 2^-8 of the result, and by float32 sums, 2^-24 of a
sum's terms for each of them. An integer product may not be off.
"""

import jax
import jax.numpy as jnp
import numpy as np

from eggroll.kernels.factors import Noise, values_of
from eggroll.kernels.int8_dot.api import int8_dot
from eggroll.kernels.lowrank_dot.api import lowrank_dot
from eggroll.kernels.lowrank_update.api import lowrank_step, lowrank_update
from eggroll.kernels.operands import float_operands, integer_operands, update_operands

HALF = 2.0**-8  # of a unit in the last place of bfloat16, relative


def step_operands(case) -> tuple:
    """W, coefficients that move it by about one of its places, noise, key."""
    coefficients, noise = update_operands(case)
    w = jax.random.normal(jax.random.key(5), (case.m, case.n)).astype(jnp.bfloat16)
    return w, coefficients * 0.01 / case.pairs**0.5, noise, jax.random.key(6)


def members(noise: Noise, *, rank: int, m: int, n: int) -> np.ndarray:
    """sqrt(r) E of every pair, built: float64 [P, m, n]."""
    left, right = (np.asarray(f, np.float64) for f in values_of(noise, rank=rank, rows=m, columns=n, dtype=jnp.float32))
    return np.einsum("pkm,pkn->pmn", left, right)


def run_dot(case, implementation):
    def run(x, w, noise, scale):
        config = case.config if implementation == "mosaic_gpu" else None
        return lowrank_dot(x, w, noise, scale=scale, rank=case.rank, implementation=implementation, config=config)

    return run


def run_update(case, implementation):
    config = case.config if implementation == "mosaic_gpu" else None
    sizes = dict(rank=case.rank, rows=case.m, columns=case.n)
    return lambda coefficients, noise: lowrank_update(
        coefficients, noise, implementation=implementation, config=config, **sizes
    )


def run_step(case, implementation):
    config = case.config if implementation == "mosaic_gpu" else None
    return lambda w, coefficients, noise, key: lowrank_step(
        w, coefficients, noise, key=key, rank=case.rank, implementation=implementation, config=config
    )


def run_product(case, implementation):
    config = case.config if implementation == "mosaic_gpu" else None
    options = dict(bits=case.bits, shift=case.shift, implementation=implementation, config=config)
    return lambda x, w, noise, sign: int8_dot(x, w, noise, sign=sign, **options)


def wide(array) -> np.ndarray:
    return np.asarray(array.astype(jnp.float32), np.float64)


def dot_oracle(case, x, w, noise, scale):
    """Every row through its own built matrix, and how far rounding may take the result from there."""
    built = members(noise, rank=case.rank, m=case.m, n=case.n)
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
    operands = float_operands(case)
    oracle, tolerance = dot_oracle(case, *operands)
    assert (np.abs(wide(out) - oracle) <= tolerance).all()
    without = np.einsum("pjm,mn->pjn", wide(operands[0]), wide(operands[1]))
    assert np.abs(without - oracle).max() > 10 * tolerance.max()  # the perturbation is there to be seen


def check_update(case, out, tolerance):
    coefficients, noise = update_operands(case)
    built = members(noise, rank=case.rank, m=case.m, n=case.n)
    oracle = np.tensordot(np.asarray(coefficients, np.float64), built, axes=1)
    assert np.abs(np.asarray(out, np.float64) - oracle).max() < tolerance * np.abs(coefficients).sum() * case.rank


def check_step(case, out):
    """One of the two neighbours of the sum, except where the sum itself is off by more than the random bits resolve."""
    w, coefficients, noise, _ = step_operands(case)
    built = members(noise, rank=case.rank, m=case.m, n=case.n)
    oracle = wide(w) + np.tensordot(np.asarray(coefficients, np.float64), built, axes=1)
    place = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(oracle), 2.0**-100))) - 7)
    slack = HALF * np.abs(coefficients).sum() * case.rank
    error = wide(out) - oracle
    assert (np.abs(error) < place + slack).all()
    # Rounding keeps the mean: every error has mean 0 and a deviation of half a place at most.
    deviation = np.sqrt(np.mean(np.square(place))) / 2 / np.sqrt(error.size)
    assert abs(error.mean()) < 4.5 * deviation + HALF * np.abs(coefficients).mean() * case.rank
    assert (np.asarray(out) != np.asarray(w)).mean() > 0.2


def check_product(case, out):
    """Exact, by 64-bit integers."""
    x, w, noise, sign = (jax.tree.map(lambda a: np.asarray(a, np.int64), a) for a in integer_operands(case))
    term = np.einsum("pjm,pkm,pkn->pjn", x, noise.left, noise.right, optimize=True)
    half = (1 << case.bits) >> 1
    rounded = np.sign(term) * ((np.abs(term) + half) >> case.bits)
    total = np.einsum("pjm,mn->pjn", x, w) + sign[..., None] * rounded
    if case.shift is not None:
        total = np.clip((total + (1 << case.shift >> 1)) >> case.shift, -127, 127)
    np.testing.assert_array_equal(np.asarray(out), total)
