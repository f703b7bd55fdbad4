"""How the Mosaic kernel of the integer product is cut into tiles, and what it refuses."""

import dataclasses

from jax import Array

from eggroll.kernels import hopper
from eggroll.kernels.factors import Noise, Values
from eggroll.kernels.groups import Groups

LEAST_TERMS = 32  # int8 values that one instruction contracts
STEP = 128  # int8 values of a row that are contracted at a time
LARGEST_FACTOR = 59  # of normal noise with 4 fractional bits


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiles of one call: a program computes 128 rows (two warpgroups of 64) by `tile_columns` of the result.

    Args:
        tile_columns: 64 or 128.
        stages: tiles of x and w in flight.
    """

    tile_columns: int = 64
    stages: int = 4


def check(x: Array, w: Array, noise: Noise, *, bits: int) -> None:
    """Raise NotImplementedError, naming the limit, unless the kernel covers the operands."""
    m, n = w.shape
    if not isinstance(noise, Values) or {str(a.dtype) for a in (x, w, *noise)} != {"int8"}:
        raise NotImplementedError("int8_dot 'mosaic_gpu' takes x, w and both factors as int8 values.")
    if noise.left.shape[1] > 4:
        raise NotImplementedError(f"int8_dot 'mosaic_gpu' takes ranks 1 to 4, got {noise.left.shape[1]}.")
    if m % STEP or n % 64:
        raise NotImplementedError(f"int8_dot 'mosaic_gpu' takes rows in multiples of {STEP} and columns of 64, got {m} x {n}.")
    if not 0 <= bits < 31:
        raise NotImplementedError(f"int8_dot 'mosaic_gpu' rounds away 0 to 30 bits, got {bits}.")


def digits(m: int) -> int:
    """Signed digits of base 256 that hold x . left, of size 128 * LARGEST_FACTOR * m at most."""
    count = 1
    while 127 * (256**count - 1) // 255 < 128 * LARGEST_FACTOR * m:
        count += 1
    return count


def choose(groups: Groups, m: int, n: int) -> Config:
    """The widest tiles that still give every multiprocessor one, by arithmetic, not by measurement."""
    filling = n % 128 == 0 and groups.count // 2 * (n // 128) >= hopper.SMS
    return fit(Config(128 if filling else 64), groups, m)


def fit(config: Config, groups: Groups, m: int) -> Config:
    """Reduce the stages to what shared memory holds.

    Raises:
        NotImplementedError: not even one stage fits.
    """
    wide = config.tile_columns
    stage = STEP * (128 + wide + 2 * groups.terms)
    rest = 2 * (groups.terms * (hopper.ROWS * digits(m) + wide) + 4 * hopper.ROWS * (wide + 1))
    most = min(config.stages, m // STEP)
    return dataclasses.replace(config, stages=hopper.stages_that_fit("int8_dot", stage=stage, rest=rest, most=most))
