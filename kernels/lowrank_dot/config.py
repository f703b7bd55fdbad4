"""How the Mosaic kernel of the low-rank product is cut into tiles, and what it refuses."""

import dataclasses
from typing import Literal

from jax import Array

from eggroll.kernels import hopper
from eggroll.kernels.factors import Noise, Values
from eggroll.kernels.groups import Groups

RANKS = range(1, 17)


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiles of one call. A program computes 128 rows (two warpgroups of 64) by `tile_columns` at a time.

    Args:
        tile_columns: columns of the result, 64, 128 or 256.
        stages: tiles of x and w in flight.
        hidden: where x A is computed: "inside" the main loop, from the tile of x that is in shared memory anyway, again for
            every tile of columns; or "before" the kernel, once, which reads x one more time. Inside costs terms / tile_columns
            of the plain product's multiplications.
    """

    tile_columns: int = 128
    stages: int = 4
    hidden: Literal["inside", "before"] = "inside"


def check(x: Array, w: Array, noise: Noise, *, rank: int) -> None:
    """Raise NotImplementedError, naming the limit, unless the kernel covers the operands."""
    m, n = w.shape
    if not x.dtype == w.dtype == "bfloat16":
        raise NotImplementedError(f"lowrank_dot 'mosaic_gpu' takes bfloat16 x and w, got {x.dtype} and {w.dtype}.")
    if isinstance(noise, Values) and {str(noise.left.dtype), str(noise.right.dtype)} not in ({"bfloat16"}, {"int8"}):
        raise NotImplementedError(
            f"lowrank_dot 'mosaic_gpu' reads factors of bfloat16 or int8, got {noise.left.dtype} and {noise.right.dtype}."
        )
    if rank not in RANKS:
        raise NotImplementedError(f"lowrank_dot 'mosaic_gpu' takes ranks 1 to {RANKS[-1]}, got {rank}.")
    if m % 64 or n % 64:
        raise NotImplementedError(f"lowrank_dot 'mosaic_gpu' takes sizes that are multiples of 64, got w of {m} x {n}.")


def choose(groups: Groups, m: int, n: int) -> Config:
    """Tiles by arithmetic, not by measurement: few rows wait for w in memory, many for the multiplications."""
    tiles_of_rows = groups.count // 2
    fitting = [columns for columns in (256, 128, 64) if n % columns == 0]
    filling = [columns for columns in fitting if tiles_of_rows * (n // columns) >= hopper.SMS]
    columns = (filling or fitting[-1:])[0]
    before = groups.terms > 128 or (groups.count * hopper.ROWS > 512 and groups.terms > columns // 16)
    return fit(Config(columns, hidden="before" if before else "inside"), groups, m)


def fit(config: Config, groups: Groups, m: int) -> Config:
    """Reduce the stages to what shared memory holds, for the form of noise that needs most.

    Raises:
        NotImplementedError: not even one stage fits.
    """
    columns, terms, inside = config.tile_columns, min(groups.terms, 128), config.hidden == "inside"
    stage = 2 * hopper.STEP * (128 + columns + (2 * terms if inside else 0))
    rest = 4 * terms * columns + 4 * min(2, columns // 64) * 64 * hopper.ROWS + 4 * hopper.ROWS * (terms + 2)
    rest += 8 * terms * max(4, columns // 32) + (8 * hopper.STEP * terms if inside else 0)
    most = min(config.stages, m // hopper.STEP)
    return dataclasses.replace(config, stages=hopper.stages_that_fit("lowrank_dot", stage=stage, rest=rest, most=most))
