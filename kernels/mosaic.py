"""What the Mosaic GPU kernels share: programs, rings and tiles in shared memory, and signs unpacked or drawn in registers."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from eggroll.kernels import hopper
from eggroll.kernels.hopper import ROWS, STEP

PROGRAM, WARPGROUP = "program", "warpgroup"  # axes of a kernel


def swizzle_of(columns: int, dtype: DTypeLike) -> int:
    """The widest swizzle of a tile, in bytes."""
    return plgpu.find_swizzle(columns * jnp.dtype(dtype).itemsize * 8)


def tile(shape: tuple[int, ...], dtype: DTypeLike, *, swizzle: int = 128) -> Any:
    """A buffer in shared memory whose last two axes wgmma reads: tiled by 8 rows and the swizzle."""
    return plgpu.SMEM(shape, dtype, transforms=tiling(shape[-1], dtype, swizzle=swizzle))


def tiling(columns: int, dtype: DTypeLike, *, swizzle: int = 128) -> tuple:
    """The transforms of such a buffer."""
    swizzle = min(swizzle, swizzle_of(columns, dtype))
    return plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(swizzle)


def unpack(first: Array, second: Array) -> Array:
    """Signs of 64 rows of one factor, float32 [64, terms].

    Args:
        first: uint32 [terms], bit i is the sign of row i.
        second: uint32 [terms], of rows 32 to 63.
    """
    shape = (STEP, first.shape[0])
    row = lax.broadcasted_iota(jnp.int32, shape, 0).astype(jnp.uint32)
    in_first = row < jnp.uint32(32)
    wide = [lax.broadcast_in_dim(word, shape, (1,)) for word in (first, second)]
    word = jnp.where(in_first, wide[0], wide[1])
    shift = jnp.where(in_first, row, row - jnp.uint32(32))
    return 1.0 - 2.0 * ((word >> shift) & jnp.uint32(1)).astype(jnp.float32)


def is_own(shape: tuple[int, ...], *, rows: int, rank: int) -> Array:
    """Whether a term of a group [64, terms] is of the row's own pair, bool.

    Args:
        shape: of the group.
        rows: of a pair, padded.
        rank: terms of a pair.
    """
    row, term = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    if rows < ROWS:
        term = term - rank * lax.div(row, jnp.int32(rows))
    return (term >= 0) & (term < rank)


def transpose(ref: Any) -> Any:
    """A buffer of two axes as wgmma reads its transpose: no copy."""
    return ref.transpose((1, 0))


def ring(step: Any, context: Any, specs: Sequence[Any], *, steps: int, stages: int) -> Any:
    """The pipeline that streams tiles to the two multiplying warpgroups of a program.

    Args:
        step: of the contraction, on the tiles that have arrived; takes and returns accumulators.
        context: what the multiplying warpgroups do around it; gets a function that runs the steps.
        specs: of the tiles, by the index of the step.
        steps: how many.
        stages: tiles of each spec that are in flight.
    """
    return plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(steps,),
        memory_registers=40,
        in_specs=specs,
        wg_axis=WARPGROUP,
        num_compute_wgs=2,
        max_concurrent_steps=stages,
        compute_context=context,
    )


def no_op(*_: Any, **__: Any) -> None:
    """Stand in for `step` and `context`, which do not matter to the buffers of a ring."""


def launch(kernel: Any, operands: Sequence[Array], out_type: jax.ShapeDtypeStruct, *, tiles: int) -> Array:
    """Run as many programs as the GPU runs at once, at most one a tile, of three warpgroups each."""
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        grid=(min(hopper.programs(), tiles),),
        grid_names=(PROGRAM,),
        num_threads=3,
        thread_name=WARPGROUP,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(*operands)
