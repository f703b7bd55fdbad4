"""The integer product of a population's activations with perturbed weights, by the implementation that is asked for."""

import functools

from jax import Array

from eggroll.kernels import hopper
from eggroll.kernels.factors import Values
from eggroll.kernels.int8_dot import config as limits
from eggroll.kernels.int8_dot import reference
from eggroll.kernels.int8_dot.config import Config


def int8_dot(
    x: Array,
    w: Array,
    noise: Values,
    *,
    sign: Array,
    bits: int,
    shift: int | None = None,
    implementation: str | None = None,
    config: Config | None = None,
) -> Array:
    """Multiply int8 activations of a population with its perturbed int8 weights, exactly.

        total[p, j] = x[p, j] w + sign[p, j] round(2^-bits (x[p, j] left[p]^T) right[p])

    Args:
        x: int8 [P, R, m], R rows a pair: the rows of all its members.
        w: int8 [m, n].
        noise: int8 factors of every pair, [P, r, m] and [P, r, n], of size 59 at most.
        sign: int32 [P, R], +1 or -1 by the row's member.
        bits: of the noise that are rounded away, to nearest, halves away from zero.
        shift: None: the int32 total; else int8, the total divided by 2^shift to nearest, halves up, saturated to [-127, 127].
        implementation: "reference" (plain JAX), "mosaic_gpu" (on Hopper), or None: the kernel where it runs and covers the
            operands, else the reference.
        config: tiles of the kernel; None: chosen by arithmetic.

    Returns:
        [P, R, n].

    Raises:
        NotImplementedError: a named implementation that cannot run here, or does not cover the operands.
        ValueError: an unknown implementation, or tiles for the reference.
    """
    check = functools.partial(limits.check, x, w, noise, bits=bits)
    if hopper.choose_implementation("int8_dot", implementation, check, config=config) == "reference":
        return reference.int8_dot(x, w, noise, sign=sign, bits=bits, shift=shift)
    from eggroll.kernels.int8_dot import mosaic_gpu  # Pallas is imported where it is used

    return mosaic_gpu.int8_dot(x, w, noise, config=config, sign=sign, bits=bits, shift=shift)
