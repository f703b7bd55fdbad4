"""How the Mosaic kernel of the low-rank update is cut into tiles, and what it refuses."""

import dataclasses

from eggroll.kernels import hopper
from eggroll.kernels.factors import Noise, Values


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiles of one call: a program computes 128 rows (two warpgroups of 64) by `tile_columns` of the sum.

    Args:
        tile_columns: 64, 128 or 256.
        stages: steps of 64 terms in flight.
    """

    tile_columns: int = 128
    stages: int = 4


def check(noise: Noise, *, rows: int, columns: int) -> None:
    """Raise NotImplementedError, naming the limit, unless the kernel covers the operands."""
    if isinstance(noise, Values) and {str(noise.left.dtype), str(noise.right.dtype)} != {"bfloat16"}:
        raise NotImplementedError(
            f"lowrank_update 'mosaic_gpu' reads factors of bfloat16, got {noise.left.dtype} and {noise.right.dtype}."
        )
    if rows % 128 or columns % 64:
        raise NotImplementedError(
            f"lowrank_update 'mosaic_gpu' takes rows in multiples of 128 and columns of 64, got {rows} x {columns}."
        )


def choose(rows: int, columns: int, terms: int, *, packed: bool) -> Config:
    """The widest tiles that still give every multiprocessor one, by arithmetic, not by measurement."""
    fitting = [width for width in (256, 128, 64) if columns % width == 0]
    filling = [width for width in fitting if rows // 128 * (columns // width) >= hopper.SMS]
    return fit(Config((filling or fitting[-1:])[0]), terms, packed=packed)


def fit(config: Config, terms: int, *, packed: bool) -> Config:
    """Reduce the stages to what shared memory holds next to the factors, which are unpacked there where they are `packed`.

    Raises:
        NotImplementedError: not even one stage fits.
    """
    wide = config.tile_columns
    stage = 4 * hopper.STEP * (5 + wide // 32) if packed else 2 * hopper.STEP * (128 + wide)
    rest = (8 * hopper.STEP * (hopper.ROWS + wide) if packed else 0) + 16 * hopper.ROWS * 32
    most = min(config.stages, terms // hopper.STEP)
    return dataclasses.replace(config, stages=hopper.stages_that_fit("lowrank_update", stage=stage, rest=rest, most=most))
