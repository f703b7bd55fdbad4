"""The weighted sum of a population's perturbations in one Mosaic GPU kernel (Hopper).

    G[i, j] = sum_t c[t] left[t, i] right[t, j]        t runs over the r terms of every pair, c is the pair's coefficient

A product over the terms, 64 at a time: packed signs are unpacked in registers and weighted there, 64 rows at a time, so that
neither the factors of the population nor the weighted ones are ever in memory. Values are weighted before the kernel.
Accumulation is float32; c left is rounded to bfloat16, by 2^-8 of itself at most.

Keys are turned into packed signs first: a tile would draw the signs of its rows again for every tile beside it.
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from eggroll.kernels import mosaic
from eggroll.kernels.factors import WORD, Noise, Values, signs_of
from eggroll.kernels.hopper import ROWS, STEP
from eggroll.kernels.lowrank_update.config import Config, choose
from eggroll.kernels.lowrank_update.reference import rounded
from eggroll.kernels.threefry import threefry

BF16 = jnp.bfloat16
PIECE = 32  # columns of the result that are stored at a time


def lowrank_update(
    coefficients: Array,
    noise: Noise,
    *,
    rank: int,
    rows: int,
    columns: int,
    config: Config | None = None,
    moved: tuple[Array, Array] | None = None,
) -> Array:
    """Arrange the terms of all pairs as one axis, padded to steps of 64, and call the kernel.

    `moved` is None for `api.lowrank_update`, (w, words of the key) for `api.lowrank_step`.
    """
    weights = jnp.repeat(coefficients.astype(jnp.float32), rank)
    terms = -(-weights.size // STEP) * STEP
    config = choose(rows, columns, terms, packed=not isinstance(noise, Values)) if config is None else config
    weights = _padded(weights, terms)
    if isinstance(noise, Values):
        left, right = (_padded(factor.reshape(-1, factor.shape[-1]), terms) for factor in noise)
        operands = (left.astype(jnp.float32) * weights[:, None]).astype(BF16), right
    else:
        words, cut = signs_of(noise, rank * (rows + columns)).words, rank * rows // WORD
        parts = words[:, :cut].reshape(-1, rows // WORD), words[:, cut:].reshape(-1, columns // WORD)
        operands = (*(_padded(part, terms).T for part in parts), weights.reshape(-1, STEP))
    return _call(operands, _with_key(moved), rows=rows, columns=columns, steps=terms // STEP, config=config)


def _with_key(moved: tuple[Array, Array] | None) -> tuple[Array, ...]:
    """W and the key spread over a row of a piece, as vectors are read."""
    return () if moved is None else (moved[0], jnp.broadcast_to(moved[1][:, None], (2, PIECE)))


def _padded(array: Array, size: int) -> Array:
    return jnp.pad(array, [(0, size - array.shape[0]), *[(0, 0)] * (array.ndim - 1)])


def _call(
    operands: tuple[Array, ...], moved: tuple[Array, ...], *, rows: int, columns: int, steps: int, config: Config
) -> Array:
    wide, packed = config.tile_columns, len(operands) == 3
    out_type = jax.ShapeDtypeStruct((rows, columns), BF16 if moved else jnp.float32)
    tiles, across = rows // (2 * ROWS) * (columns // wide), columns // wide

    def kernel(*refs):
        *given, out = refs
        w, key = given[len(operands) :] or (None, None)
        unused = _pipeline(mosaic.no_op, mosaic.no_op, steps, config, packed)
        buffers: dict[str, Any] = dict(
            ring=unused.get_allocations(*_streams(given, 0, 0, config, packed)),
            result=mosaic.tile((2, ROWS, PIECE), out_type.dtype),
        )
        if moved:
            buffers["piece"] = mosaic.tile((2, ROWS, PIECE), BF16)
            buffers["key"] = plgpu.SMEM((2, 2, PIECE), jnp.uint32)
            buffers["arrived"] = plgpu.Barrier(num_arrivals=2, num_barriers=2)
        if packed:
            # Two of each: a warp may be one step ahead of another one whose product still reads.
            buffers["left"] = mosaic.tile((2, 2, ROWS, STEP), BF16)
            buffers["right"] = mosaic.tile((2, 2, wide, STEP), BF16)

        @functools.partial(pl.run_scoped, **buffers, collective_axes=mosaic.WARPGROUP)
        def _(ring, result, left=None, right=None, **of_step):
            warpgroup = lax.axis_index(mosaic.WARPGROUP)
            own = {name: buffer.at[warpgroup] for name, buffer in of_step.items()}

            @plgpu.nd_loop((tiles,), collective_axes=mosaic.PROGRAM)
            def _(loop):
                down, beside = lax.div(loop.index[0], across), lax.rem(loop.index[0], across)

                def step(at, *streamed_and_total):
                    *streamed, total = streamed_and_total
                    if packed:
                        expanded = [buffer.at[warpgroup, lax.rem(at[0], 2)] for buffer in (left, right)]
                        _unpack(streamed, *expanded, warpgroup, wide)
                        operands = expanded[0], mosaic.transpose(expanded[1])
                    else:
                        rows_of_group = streamed[0].at[:, pl.ds(warpgroup * ROWS, ROWS)]
                        operands = mosaic.transpose(rows_of_group), streamed[1]
                    plgpu.wgmma(total, *operands)
                    plgpu.wgmma_wait(0)
                    return total

                def context(stream):
                    @functools.partial(pl.run_scoped, total=plgpu.ACC((ROWS, wide)))
                    def _(total):
                        stream(total)
                        where = (2 * down + warpgroup) * ROWS, beside * wide
                        _store(total[...], result.at[warpgroup], out, where, w, key, own)

                pipeline = _pipeline(step, context, steps, config, packed)
                pipeline(*_streams(given, down, beside, config, packed), allocations=ring)

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    return mosaic.launch(kernel, (*operands, *moved), out_type, tiles=tiles)


def _pipeline(step: Any, context: Any, steps: int, config: Config, packed: bool) -> Any:
    """The ring that streams the factors, 64 terms at a time: words [rows / 32, 64] and weights, or values [64, rows]."""
    wide = config.tile_columns
    if packed:
        blocks = [(2 * ROWS // WORD, STEP), (wide // WORD, STEP)]
        specs = [plgpu.BlockSpec(block, lambda k: (0, k), memory_space=plgpu.SMEM) for block in blocks]
        specs.append(plgpu.BlockSpec((1, STEP), lambda k: (k, 0), memory_space=plgpu.SMEM))
    else:
        specs = [
            plgpu.BlockSpec((STEP, size), lambda k: (k, 0), transforms=mosaic.tiling(size, BF16), memory_space=plgpu.SMEM)
            for size in (2 * ROWS, wide)
        ]
    return mosaic.ring(step, context, specs, steps=steps, stages=config.stages)


def _streams(given: list[Any], down: Any, beside: Any, config: Config, packed: bool) -> list[Any]:
    wide = config.tile_columns
    if packed:
        left, right, weights = given[:3]
        rows = pl.ds(down * (2 * ROWS // WORD), 2 * ROWS // WORD)
        return [left.at[rows], right.at[pl.ds(beside * (wide // WORD), wide // WORD)], weights]
    left, right = given[:2]
    return [left.at[:, pl.ds(down * 2 * ROWS, 2 * ROWS)], right.at[:, pl.ds(beside * wide, wide)]]


def _unpack(streamed: list[Any], left: Any, right: Any, warpgroup: Any, wide: int) -> None:
    """64 terms: the weighted signs of this warpgroup's 64 rows, and the signs of the columns."""
    left_words, right_words, weights = streamed
    signs = mosaic.unpack(left_words[2 * warpgroup], left_words[2 * warpgroup + 1])
    left[...] = (signs * lax.broadcast_in_dim(weights[0], signs.shape, (1,))).astype(BF16)
    for at in range(wide // STEP):
        right[pl.ds(at * STEP, STEP)] = mosaic.unpack(right_words[2 * at], right_words[2 * at + 1]).astype(BF16)
    plgpu.commit_smem()


def _store(total: Array, result: Any, out: Any, where: tuple[Any, Any], w: Any, key: Any, own: dict[str, Any]) -> None:
    """Copy the sum out, or what it makes of W, piece by piece."""
    for at in range(0, total.shape[1], PIECE):
        there = pl.ds(where[0], ROWS), pl.ds(where[1] + at, PIECE)
        piece = total[:, at : at + PIECE]
        if w is not None:
            plgpu.commit_smem()  # no warp still reads the piece before
            plgpu.copy_gmem_to_smem(w.at[there], own["piece"], own["arrived"])
            plgpu.copy_gmem_to_smem(key, own["key"], own["arrived"])
            plgpu.barrier_wait(own["arrived"])
            piece = _moved(piece, own, where[0], where[1] + at)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        result[...] = piece
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(result, out.at[there])


def _moved(piece: Array, own: dict[str, Any], row: Any, column: Any) -> Array:
    """W + G of one piece, rounded by the words at the counters (row, column)."""
    high, low = (
        (lax.broadcasted_iota(jnp.int32, piece.shape, axis) + first).astype(jnp.uint32)
        for axis, first in enumerate((row, column))
    )
    key = tuple(lax.broadcast_in_dim(own["key"][half], piece.shape, (1,)) for half in range(2))
    words, _ = threefry(key, low, high=high)
    return rounded(own["piece"][...].astype(jnp.float32) + piece, words)
