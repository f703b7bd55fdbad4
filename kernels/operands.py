"""Operands of the cases that tests and the benchmark share: random inputs of unit size, noise in one form."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from eggroll.kernels.factors import Noise, SignKeys, Values, signs_of, values_of


def noise_of(form: str, *, pairs: int, rank: int, m: int, n: int) -> Noise:
    """Noise in one form; "words" and "values" hold the signs that "keys" draws."""
    if form == "int8":
        left, right = jax.random.key(3), jax.random.key(4)
        return Values(_integers(left, (pairs, rank, m), 59), _integers(right, (pairs, rank, n), 59))
    keys = SignKeys(jax.random.bits(jax.random.key(2), (pairs, 2), jnp.uint32))
    if form == "keys":
        return keys
    if form == "words":
        return signs_of(keys, rank * (m + n))
    return values_of(keys, rank=rank, rows=m, columns=n, dtype=jnp.bfloat16)


def float_operands(case) -> tuple:
    """x, w, noise, scale of a floating product, of unit size, the perturbation as large as the product."""
    x = jax.random.normal(jax.random.key(0), (case.pairs, case.rows, case.m), jnp.bfloat16)
    w = (jax.random.normal(jax.random.key(1), (case.m, case.n)) / case.m**0.5).astype(jnp.bfloat16)
    noise = noise_of(case.form, pairs=case.pairs, rank=case.rank, m=case.m, n=case.n)
    size = (30.0**2 if case.form == "int8" else 1.0) * (case.m * case.rank) ** 0.5
    signs = 1.0 - 2.0 * (np.arange(case.pairs * case.rows) % 2)
    return x, w, noise, jnp.asarray(signs.reshape(case.pairs, case.rows) / size, jnp.float32)


def update_operands(case) -> tuple:
    """Coefficients and noise of an update."""
    noise = noise_of(case.form, pairs=case.pairs, rank=case.rank, m=case.m, n=case.n)
    return jax.random.normal(jax.random.key(0), (case.pairs,)), noise


def integer_operands(case) -> tuple:
    """x, w, noise, sign of an integer product."""
    x = _integers(jax.random.key(0), (case.pairs, case.rows, case.m), 127)
    w = _integers(jax.random.key(1), (case.m, case.n), 127)
    signs = 1 - 2 * (np.arange(case.pairs * case.rows) % 2)
    noise = noise_of("int8", pairs=case.pairs, rank=case.rank, m=case.m, n=case.n)
    return x, w, noise, jnp.asarray(signs.reshape(case.pairs, case.rows), jnp.int32)


def _integers(key, shape: tuple[int, ...], largest: int) -> Array:
    return jax.random.randint(key, shape, -largest, largest + 1).astype(jnp.int8)
