"""The weighted sum of a population's perturbations of one matrix, by the implementation that is asked for."""

import functools

import jax
from jax import Array

from eggroll.kernels import hopper
from eggroll.kernels.factors import Noise
from eggroll.kernels.lowrank_update import config as limits
from eggroll.kernels.lowrank_update.config import Config
from eggroll.kernels.lowrank_update.reference import population_step, population_update


def lowrank_update(
    coefficients: Array,
    noise: Noise,
    *,
    rank: int,
    rows: int,
    columns: int,
    implementation: str | None = None,
    config: Config | None = None,
) -> Array:
    """Sum the perturbations of all pairs, weighted.

        G = sum_p coefficients[p] left[p]^T right[p]

    Args:
        coefficients: float32 [P].
        noise: of every pair, in any form of `kernels.factors`.
        rank: r.
        rows: m.
        columns: n.
        implementation: "reference" (plain JAX, float32), "mosaic_gpu" (on Hopper; coefficients times left are rounded to
            bfloat16, sums are float32), or None: the kernel where it runs and covers the operands, else the reference.
        config: tiles of the kernel; None: chosen by arithmetic.

    Returns:
        float32 [m, n].

    Raises:
        NotImplementedError: a named implementation that cannot run here, or does not cover the operands.
        ValueError: an unknown implementation, or tiles for the reference.
    """
    check = functools.partial(limits.check, noise, rows=rows, columns=columns)
    if hopper.choose_implementation("lowrank_update", implementation, check, config=config) == "reference":
        return population_update(coefficients, noise, rank=rank, rows=rows, columns=columns)
    from eggroll.kernels.lowrank_update import mosaic_gpu  # Pallas is imported where it is used

    return mosaic_gpu.lowrank_update(coefficients, noise, config=config, rank=rank, rows=rows, columns=columns)


def lowrank_step(
    w: Array,
    coefficients: Array,
    noise: Noise,
    *,
    key: Array,
    rank: int,
    implementation: str | None = None,
    config: Config | None = None,
) -> Array:
    """Move a bfloat16 matrix by the sum of the weighted perturbations, rounded stochastically; the sum is never in memory.

        w + sum_p coefficients[p] left[p]^T right[p]        coefficients hold the step size: plain gradient ascent

    Args:
        w: bfloat16 [m, n].
        coefficients: float32 [P].
        noise: of every pair, in any form of `kernels.factors`.
        key: typed threefry key, consumed; entry (i, j) is rounded by the word at its counter (i, j).
        rank: r.
        implementation: as of `lowrank_update`.
        config: tiles of the kernel; None: chosen by arithmetic.

    Returns:
        bfloat16 [m, n], each entry one of the two neighbours of its sum, whose mean it keeps.

    Raises:
        NotImplementedError: a named implementation that cannot run here, or does not cover the operands.
        ValueError: an unknown implementation, or tiles for the reference.
    """
    words = jax.random.key_data(key)

    def check() -> None:
        limits.check(noise, rows=w.shape[0], columns=w.shape[1])
        if w.dtype != "bfloat16":
            raise NotImplementedError(f"lowrank_step 'mosaic_gpu' moves bfloat16 matrices, got {w.dtype}.")

    if hopper.choose_implementation("lowrank_step", implementation, check, config=config) == "reference":
        return population_step(w, coefficients, noise, key=words, rank=rank)
    from eggroll.kernels.lowrank_update import mosaic_gpu  # Pallas is imported where it is used

    rows, columns = w.shape
    return mosaic_gpu.lowrank_update(
        coefficients, noise, config=config, moved=(w, words), rank=rank, rows=rows, columns=columns
    )
