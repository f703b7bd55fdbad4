"""The integer product of a population in one Mosaic GPU kernel (Hopper), exact.

    out[i] = x[i] w + sign[i] round(2^-bits sum_e h[i, e] right[e])
    h[i, e] = x[i] . left[e] where term e is of row i's pair, else 0

Rows are grouped and terms masked as in the floating kernel. h does not fit int8, which is what the tensor cores multiply, so it
is split into signed digits of base 256: sum_e h right = sum_d 256^d (digit_d right), one small product a digit. The tensor
cores read int8 operands along the contracted axis only, so w is read transposed and right is arranged by columns.
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from eggroll.kernels import mosaic
from eggroll.kernels.factors import Values
from eggroll.kernels.groups import Groups
from eggroll.kernels.hopper import ROWS
from eggroll.kernels.int8_dot.config import LEAST_TERMS, STEP, Config, choose, digits
from eggroll.kernels.int8_dot.reference import rescaled, rounded

INT8 = jnp.int8


def int8_dot(x: Array, w: Array, noise: Values, *, sign: Array, bits: int, shift: int | None, config: Config | None) -> Array:
    """Pad and arrange the operands, call the kernel, and cut the padding off; see `api.int8_dot`."""
    (pairs, rows, m), n = x.shape, w.shape[1]
    groups = Groups.of(pairs, rows, noise.left.shape[1], least_terms=LEAST_TERMS)
    config = choose(groups, m, n) if config is None else config
    left, right = (groups.by_group(groups.pad_pairs(factor)) for factor in noise)
    x, sign = groups.pad_rows(x), groups.pad_rows(sign.astype(jnp.int32))
    operands = x.reshape(-1, m), w.T, left.reshape(-1, m), right.transpose(0, 2, 1), sign.reshape(-1, ROWS)
    out = _call(operands, groups=groups, config=config, bits=bits, shift=shift)
    return out.reshape(groups.pairs, groups.rows, n)[:pairs, :rows]


def _call(operands: tuple[Array, ...], *, groups: Groups, config: Config, bits: int, shift: int | None) -> Array:
    (rows, m), n = operands[0].shape, operands[1].shape[0]
    wide, terms, across = config.tile_columns, groups.terms, n // config.tile_columns
    tiles = rows // (2 * ROWS) * across
    out_type = jax.ShapeDtypeStruct((rows, n), jnp.int32 if shift is None else INT8)
    factors = 1 if groups.share_pair else 2

    def kernel(x, w, left, right, sign, out):
        def pipeline(step, context):
            specs = [
                plgpu.BlockSpec((size, STEP), lambda k: (0, k), transforms=mosaic.tiling(STEP, INT8), memory_space=plgpu.SMEM)
                for size in (2 * ROWS, wide, factors * terms)
            ]
            return mosaic.ring(step, context, specs, steps=m // STEP, stages=config.stages)

        def streams(down, beside):
            first = lax.div(down, groups.rows // (2 * ROWS)) if groups.share_pair else 2 * down
            size = factors * terms
            own_rows, own_columns = pl.ds(down * 2 * ROWS, 2 * ROWS), pl.ds(beside * wide, wide)
            return x.at[own_rows], w.at[own_columns], left.at[pl.ds(first * terms, size)]

        @functools.partial(
            pl.run_scoped,
            ring=pipeline(mosaic.no_op, mosaic.no_op).get_allocations(*streams(0, 0)),
            signs=plgpu.SMEM((2, ROWS), jnp.int32),
            digit=mosaic.tile((2, digits(m), ROWS, terms), INT8),
            right_tile=mosaic.tile((2, wide, terms), INT8),
            result=mosaic.tile((2, ROWS, wide), out_type.dtype),
            arrived=plgpu.Barrier(num_arrivals=2, num_barriers=2),
            collective_axes=mosaic.WARPGROUP,
        )
        def _(ring, signs, digit, right_tile, result, arrived):
            warpgroup = lax.axis_index(mosaic.WARPGROUP)
            own = 0 if groups.share_pair else warpgroup

            @plgpu.nd_loop((tiles,), collective_axes=mosaic.PROGRAM)
            def _(loop):
                down, beside = lax.div(loop.index[0], across), lax.rem(loop.index[0], across)
                group = 2 * down + warpgroup

                def step(_, x_tile, w_tile, left_tile, accumulators):
                    mine = x_tile.at[pl.ds(warpgroup * ROWS, ROWS)]
                    plgpu.wgmma(accumulators[0], mine, mosaic.transpose(w_tile))
                    terms_of_group = left_tile.at[pl.ds(own * terms, terms)]
                    plgpu.wgmma(accumulators[1], mine, mosaic.transpose(terms_of_group))
                    plgpu.wgmma_wait(0)
                    return accumulators

                def context(stream):
                    factor = lax.div(down, groups.rows // (2 * ROWS)) if groups.share_pair else group
                    columns = pl.ds(beside * wide, wide)
                    plgpu.copy_gmem_to_smem(sign.at[group], signs.at[warpgroup], arrived.at[warpgroup])
                    plgpu.copy_gmem_to_smem(right.at[factor, columns], right_tile.at[warpgroup], arrived.at[warpgroup])

                    def products(total, hidden):
                        stream((total, hidden))
                        return total[...], hidden[...]

                    accumulators = (plgpu.ACC((ROWS, size), jnp.int32) for size in (wide, terms))
                    total, hidden = pl.run_scoped(products, *accumulators)
                    plgpu.barrier_wait(arrived.at[warpgroup])
                    _split(_masked(hidden, groups), digit.at[warpgroup], digits(m))
                    plgpu.commit_smem()
                    term = _term(digit.at[warpgroup], right_tile.at[warpgroup], digits(m), (ROWS, wide))
                    signs_of_rows = lax.broadcast_in_dim(signs[warpgroup], term.shape, (0,))
                    total = rescaled(total + signs_of_rows * rounded(term, bits), shift)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    result[warpgroup] = total
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(result.at[warpgroup], out.at[pl.ds(group * ROWS, ROWS), columns])

                pipeline(step, context)(*streams(down, beside), allocations=ring)

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    return mosaic.launch(kernel, operands, out_type, tiles=tiles)


def _masked(hidden: Array, groups: Groups) -> Array:
    """The terms of a row's own pair, 0 elsewhere."""
    return jnp.where(mosaic.is_own(hidden.shape, rows=groups.rows, rank=groups.rank), hidden, jnp.int32(0))


def _split(hidden: Array, into: Any, count: int) -> None:
    """Write signed digits of base 256, the lowest first."""
    for place in range(count):
        low = ((hidden + jnp.int32(128)) & jnp.int32(255)) - jnp.int32(128)
        into[place] = low.astype(INT8)
        hidden = (hidden - low) >> jnp.int32(8)


def _term(digit: Any, right: Any, count: int, shape: tuple[int, int]) -> Array:
    """sum_d 256^d (digit_d right), int32."""

    def product(place):
        def multiplied(accumulator):
            plgpu.wgmma(accumulator, digit.at[place], mosaic.transpose(right))
            plgpu.wgmma_wait(0)
            return accumulator[...]

        return pl.run_scoped(multiplied, plgpu.ACC(shape, jnp.int32))

    term = product(count - 1)
    for place in range(count - 2, -1, -1):
        term = (term << jnp.int32(8)) + product(place)
    return term
