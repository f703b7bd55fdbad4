"""The product of a population's activations with perturbed weights, by the implementation that is asked for."""

import functools

from jax import Array

from eggroll.kernels import hopper
from eggroll.kernels.factors import Noise
from eggroll.kernels.lowrank_dot import config as limits
from eggroll.kernels.lowrank_dot.config import Config
from eggroll.kernels.lowrank_dot.reference import population_dot


def lowrank_dot(
    x: Array,
    w: Array,
    noise: Noise,
    *,
    scale: Array,
    rank: int,
    implementation: str | None = None,
    config: Config | None = None,
) -> Array:
    """Multiply the activations of a population with its perturbed weights.

        out[p, j] = x[p, j] w + scale[p, j] (x[p, j] left[p]^T) right[p]

    Args:
        x: [P, R, m], R rows a pair: the rows of all its members.
        w: [m, n].
        noise: of every pair, in any form of `kernels.factors`.
        scale: float32 [P, R], sign * sigma / sqrt(r) of the row's member.
        rank: r.
        implementation: "reference" (plain JAX), "mosaic_gpu" (bfloat16, on Hopper), or None: the kernel where it runs and
            covers the operands, else the reference.
        config: tiles of the kernel; None: chosen by arithmetic.

    Returns:
        [P, R, n] of x's dtype; products accumulate in float32, x left^T is rounded to x's dtype.

    Raises:
        NotImplementedError: a named implementation that cannot run here, or does not cover the operands.
        ValueError: an unknown implementation, or tiles for the reference.
    """
    check = functools.partial(limits.check, x, w, noise, rank=rank)
    if hopper.choose_implementation("lowrank_dot", implementation, check, config=config) == "reference":
        return population_dot(x, w, noise, scale=scale, rank=rank)
    from eggroll.kernels.lowrank_dot import mosaic_gpu  # Pallas is imported where it is used

    return mosaic_gpu.lowrank_dot(x, w, noise, scale=scale, rank=rank, config=config)
