"""The low-rank product of a population in one Mosaic GPU kernel (Hopper).

    out[i] = x[i] w + sum_e c[i, e] right[e]        c[i, e] = scale[i] (x[i] . left[e]) where term e is of row i's pair, else 0

A group of 64 rows holds 64 / R pairs of R rows (or a part of one pair); the terms e of a group are the r terms of each of its
pairs. So x A is one more small product, masked, and the perturbation is one more step of the main product's contraction: a step
of `terms` after m / 64 steps of 64. Both run on the tensor cores, c never leaves the program, and the result is stored once.

A program has three warpgroups: one fetches tiles of x, w and left through a ring of buffers, two multiply, 64 rows each.
Accumulation is float32; c is rounded to bfloat16, as the reference rounds it.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from eggroll.kernels import mosaic
from eggroll.kernels.factors import WORD, Noise, Signs, Values, values_of
from eggroll.kernels.groups import CHUNK, Groups
from eggroll.kernels.hopper import ROWS, STEP
from eggroll.kernels.lowrank_dot.config import Config, choose
from eggroll.kernels.threefry import threefry

BF16 = jnp.bfloat16


class Operands(NamedTuple):
    """What the kernel reads of the noise, arranged by groups of rows; None where a form has none."""

    left: Any  # values [F terms, m]; words [F, m / 64, 2, terms]
    right: Any  # values [F terms, n]; words [F, n / 32, terms]; keys [F, 4, terms]: key, first calls of left and right
    hidden: Any  # bfloat16 [rows, terms], c itself, where it is computed before


def lowrank_dot(x: Array, w: Array, noise: Noise, *, scale: Array, rank: int, config: Config | None) -> Array:
    """Pad and arrange the operands, call the kernel, and cut the padding off; see `api.lowrank_dot`."""
    (pairs, rows, m), n = x.shape, w.shape[1]
    groups = Groups.of(pairs, rows, rank, least_terms=least_terms(noise))
    config = choose(groups, m, n) if config is None else config
    if config.hidden == "inside" and groups.terms > CHUNK:
        raise NotImplementedError(f"x A can be computed inside the kernel for {CHUNK} terms, not for {groups.terms}.")
    x, scale = groups.pad_rows(x), groups.pad_rows(scale.astype(jnp.float32))
    noise = type(noise)(*map(groups.pad_pairs, noise))
    operands = _arranged(noise, groups, m, n)
    if config.hidden == "before":
        operands = operands._replace(left=None, hidden=_hidden_before(x, noise, scale, groups, m, n))
    out = _call(x.reshape(-1, m), w, operands, scale.reshape(-1, ROWS), groups=groups, config=config, form=_form(noise))
    return out.reshape(groups.pairs, groups.rows, n)[:pairs, :rows]


def _form(noise: Noise) -> str:
    if isinstance(noise, Values):
        return "int8" if noise.left.dtype == jnp.int8 else "values"
    return "words" if isinstance(noise, Signs) else "keys"


def least_terms(noise: Noise) -> int:
    """The terms of a group are a multiple of this: 16 are contracted at once; int8 factors are converted 64 rows at a time."""
    return 64 if _form(noise) == "int8" else 16


def _arranged(noise: Noise, groups: Groups, m: int, n: int) -> Operands:
    rank = groups.rank
    if isinstance(noise, Values):
        left, right = (groups.by_group(factor).reshape(-1, factor.shape[-1]) for factor in noise)
        return Operands(left, right, None)
    if isinstance(noise, Signs):
        cut = rank * m // WORD
        left = groups.by_group(noise.words[:, :cut].reshape(-1, rank, m // WORD))
        right = groups.by_group(noise.words[:, cut:].reshape(-1, rank, n // WORD))
        left = left.reshape(*left.shape[:2], m // STEP, 2).transpose(0, 2, 3, 1)
        return Operands(left, right.transpose(0, 2, 1), None)
    calls = jnp.arange(rank, dtype=jnp.uint32)  # a call gives the signs of 64 rows
    own = [noise.keys[:, :1], noise.keys[:, 1:], calls * (m // STEP), rank * (m // STEP) + calls * (n // STEP)]
    spread = [jnp.broadcast_to(value, (groups.pairs, rank)) for value in own]
    return Operands(None, groups.by_group(jnp.stack(spread, axis=-1)).transpose(0, 2, 1), None)


def _hidden_before(x: Array, noise: Noise, scale: Array, groups: Groups, m: int, n: int) -> Array:
    """c, bfloat16 [rows, terms]."""
    values = values_of(noise, rank=groups.rank, rows=m, columns=n, dtype=BF16)
    hidden = jnp.einsum("pjm,pkm->pjk", x, values.left, preferred_element_type=jnp.float32) * scale[..., None]
    hidden = hidden.reshape(groups.count, -1, min(groups.rows, ROWS), groups.rank)  # [groups, pairs of one, R, r]
    own = jnp.eye(groups.pairs_of_one, dtype=jnp.float32)
    spread = jnp.einsum("gqjk,qt->gqjtk", hidden, own).reshape(groups.count * ROWS, -1).astype(BF16)
    return jnp.pad(spread, [(0, 0), (0, groups.terms - spread.shape[1])])


def _call(x: Array, w: Array, operands: Operands, scale: Array, *, groups: Groups, config: Config, form: str) -> Array:
    present = [array for array in (x, w, *operands, scale) if array is not None]
    out_type = jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), BF16)
    tiles = x.shape[0] // (2 * ROWS) * (w.shape[1] // config.tile_columns)
    which = [array is not None for array in operands]

    def body(*refs):
        given = iter(refs)
        x_ref, w_ref = next(given), next(given)
        noise = Operands(*(next(given) if there else None for there in which))
        _Program(x_ref, w_ref, noise, next(given), next(given), groups, config, form).run(tiles)

    return mosaic.launch(body, present, out_type, tiles=tiles)


@dataclasses.dataclass(frozen=True)
class _Program:
    """One program: it computes tiles [128, tile_columns] of the result, one after the other."""

    x: Any  # [rows, m]
    w: Any  # [m, n]
    noise: Operands
    scale: Any  # [groups, 64]
    out: Any  # [rows, n]
    groups: Groups
    config: Config
    form: str  # of the noise: "values", "int8", "words" or "keys"

    @property
    def inside(self) -> bool:
        """Whether x A is computed here."""
        return self.config.hidden == "inside"

    @property
    def chunk(self) -> int:
        """Terms whose right factors are in shared memory at once."""
        return min(self.groups.terms, CHUNK)

    @property
    def swizzle(self) -> int:
        """Of x and w: the one of the left factor, which wgmma reads next to x."""
        return min(128, 2 * self.groups.terms) if self.inside and self.form in ("words", "keys") else 128

    def run(self, tiles: int) -> None:
        """Compute this program's share of the tiles."""
        across = self.w.shape[1] // self.config.tile_columns

        @functools.partial(pl.run_scoped, **self._buffers(), collective_axes=mosaic.WARPGROUP)
        def _(**buffers):
            @plgpu.nd_loop((tiles,), collective_axes=mosaic.PROGRAM)
            def _(loop):
                down, right = lax.div(loop.index[0], across), lax.rem(loop.index[0], across)
                _Tile(self, down, right, lax.axis_index(mosaic.WARPGROUP), buffers).compute()

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def _buffers(self) -> dict[str, Any]:
        columns, chunk, packed = self.config.tile_columns, self.chunk, self.form in ("words", "keys")
        buffers: dict[str, Any] = dict(
            ring=self.pipeline(mosaic.no_op, mosaic.no_op).get_allocations(*self.streams(0, 0)),
            result=mosaic.tile((2, min(2, columns // 64), ROWS, 64), BF16),
            hidden=mosaic.tile((2, ROWS, chunk), BF16),
            right=mosaic.tile((2, columns, chunk) if packed else (2, chunk, columns), BF16, swizzle=min(128, 2 * chunk)),
            arrived=plgpu.Barrier(num_arrivals=2, num_barriers=2),
        )
        if self.inside:
            buffers["scale"] = plgpu.SMEM((2, ROWS), jnp.float32)
        if packed:
            buffers["words"] = plgpu.SMEM((2, columns // WORD if self.form == "words" else 4, chunk), jnp.uint32)
        if self.form == "int8":
            buffers["integers"] = mosaic.tile((2, chunk, columns), jnp.int8)
        if self.inside and self.form != "values":
            # Two of each: a warp may be one step ahead of another one whose product still reads.
            shape = (2, 2, chunk, STEP) if self.form == "int8" else (2, 2, STEP, chunk)
            buffers["left"] = mosaic.tile(shape, BF16, swizzle=self.swizzle)
        return buffers

    def pipeline(self, body: Any, context: Any) -> Any:
        """The ring that streams x, w and the left factor through shared memory."""
        columns, terms = self.config.tile_columns, self.groups.terms
        specs = [
            _streamed((2 * ROWS, STEP), 1, BF16, swizzle=self.swizzle),
            _streamed((STEP, columns), 0, BF16, swizzle=self.swizzle),
        ]
        shared = 1 if self.groups.share_pair else 2
        if self.inside and self.form in ("values", "int8"):
            specs.append(_streamed((shared * terms, STEP), 1, self.noise.left.dtype))
        if self.inside and self.form == "words":
            specs.append(plgpu.BlockSpec((shared, 1, 2, terms), lambda k: (0, k, 0, 0), memory_space=plgpu.SMEM))
        return mosaic.ring(body, context, specs, steps=self.x.shape[1] // STEP, stages=self.config.stages)

    def streams(self, down: Any, right: Any) -> list[Any]:
        """What the ring fetches for one tile."""
        columns, terms = self.config.tile_columns, self.groups.terms
        streams = [self.x.at[pl.ds(down * 2 * ROWS, 2 * ROWS)], self.w.at[:, pl.ds(right * columns, columns)]]
        if self.inside and self.form != "keys":
            first, count = self.factors(down)
            size = 1 if self.form == "words" else terms
            streams.append(self.noise.left.at[pl.ds(first * size, count * size)])
        return streams

    def factors(self, down: Any) -> tuple[Any, int]:
        """The first group of factors of one tile of rows, and how many."""
        if not self.groups.share_pair:
            return 2 * down, 2
        return lax.div(down, self.groups.rows // (2 * ROWS)), 1


@dataclasses.dataclass(frozen=True)
class _Tile:
    """One warpgroup's half of one tile: 64 rows."""

    program: _Program
    down: Any
    across: Any
    warpgroup: Any
    buffers: dict[str, Any]

    def part(self, name: str) -> Any:
        """This warpgroup's part of a buffer."""
        return self.buffers[name].at[self.warpgroup]

    @property
    def own(self) -> Any:
        """This warpgroup's index among the factors of the tile."""
        return 0 if self.program.groups.share_pair else self.warpgroup

    def compute(self) -> None:
        program = self.program
        streams = program.streams(self.down, self.across)
        program.pipeline(self.step, self.context)(*streams, allocations=self.buffers["ring"])

    def context(self, stream: Any) -> None:
        """What the multiplying warpgroups do around the ring."""
        program = self.program
        columns, chunk = program.config.tile_columns, program.chunk
        accumulators = dict(total=plgpu.ACC((ROWS, columns)))
        if program.inside:
            accumulators["hidden"] = plgpu.ACC((ROWS, program.groups.terms))

        @functools.partial(pl.run_scoped, **accumulators)
        def _(total, hidden=None):
            self.fetch(0)
            early = program.inside and program.form == "keys"  # the ring's steps read them
            if early:
                plgpu.barrier_wait(self.part("arrived"))
            stream((total, hidden) if program.inside else (total,))
            for first in range(0, program.groups.terms, chunk):
                if first:
                    plgpu.commit_smem()  # no warp still reads what is fetched over
                    self.fetch(first)
                if not early:
                    plgpu.barrier_wait(self.part("arrived"))
                if program.inside:
                    self.part("hidden")[...] = self.masked(hidden[...]).astype(BF16)
                right = self.expanded_right()
                plgpu.commit_smem()
                plgpu.wgmma(total, self.part("hidden"), right)
                plgpu.wgmma_wait(0)
            self.store(total[...].astype(BF16))

    def fetch(self, first: int) -> None:
        """Start to copy what a chunk of terms needs next to the ring: two copies."""
        program = self.program
        group, chunk, columns = 2 * self.down + self.warpgroup, program.chunk, program.config.tile_columns
        if program.inside:
            plgpu.copy_gmem_to_smem(program.scale.at[group], self.part("scale"), self.part("arrived"))
        else:
            rows = pl.ds(group * ROWS, ROWS), pl.ds(first, chunk)
            plgpu.copy_gmem_to_smem(program.noise.hidden.at[rows], self.part("hidden"), self.part("arrived"))
        factors = program.factors(self.down)[0] + self.own
        terms, right = pl.ds(first, chunk), program.noise.right
        if program.form == "keys":
            plgpu.copy_gmem_to_smem(right.at[factors, :, terms], self.part("words"), self.part("arrived"))
        elif program.form == "words":
            own = pl.ds(self.across * (columns // WORD), columns // WORD)
            plgpu.copy_gmem_to_smem(right.at[factors, own, terms], self.part("words"), self.part("arrived"))
        else:
            rows = pl.ds(factors * program.groups.terms + first, chunk)
            into = self.part("integers") if program.form == "int8" else self.part("right")
            plgpu.copy_gmem_to_smem(right.at[rows, pl.ds(self.across * columns, columns)], into, self.part("arrived"))

    def step(self, at: Any, x: Any, w: Any, *rest: Any) -> Any:
        """One step of the contraction: x w, and x A where it is computed here."""
        *left, accumulators = rest
        x = x.at[pl.ds(self.warpgroup * ROWS, ROWS)]
        if self.program.inside:
            left = self.expanded_left(at[0], *left)  # before the products start
        plgpu.wgmma(accumulators[0], x, w)
        if self.program.inside:
            plgpu.wgmma(accumulators[1], x, left)
        plgpu.wgmma_wait(0)
        return accumulators

    def expanded_left(self, step: Any, streamed: Any = None) -> Any:
        """The left factors of a step of rows, [64, terms], bfloat16 in shared memory."""
        form, terms = self.program.form, self.program.groups.terms
        if form in ("values", "int8"):
            streamed = streamed.at[pl.ds(self.own * terms, terms)]
        if form == "values":
            return mosaic.transpose(streamed)
        if form == "int8":
            expanded = streamed[...]
        elif form == "words":
            expanded = mosaic.unpack(streamed[self.own, 0, 0], streamed[self.own, 0, 1])
        else:
            first = self.buffers["words"][self.warpgroup, 2]
            expanded = mosaic.unpack(*self.drawn(first + step.astype(jnp.uint32)))
        left = self.buffers["left"].at[self.warpgroup, lax.rem(step, 2)]
        left[...] = expanded.astype(BF16)
        plgpu.commit_smem()
        return mosaic.transpose(left) if form == "int8" else left

    def drawn(self, call: Array) -> tuple[Array, Array]:
        """The words of 64 rows of every term."""
        words = self.buffers["words"]
        return threefry((words[self.warpgroup, 0], words[self.warpgroup, 1]), call)

    def masked(self, hidden: Array) -> Array:
        """The terms of a row's own pair, scaled; 0 elsewhere."""
        groups = self.program.groups
        own = mosaic.is_own(hidden.shape, rows=groups.rows, rank=groups.rank)
        scale = lax.broadcast_in_dim(self.buffers["scale"][self.warpgroup], hidden.shape, (0,))
        return jnp.where(own, hidden * scale, 0.0)

    def expanded_right(self) -> Any:
        """The right factors of a chunk of terms, [chunk, tile_columns], bfloat16 in shared memory."""
        form, words = self.program.form, self.buffers.get("words", self.buffers)
        if form == "values":
            return self.part("right")
        if form == "int8":
            self.part("right")[...] = self.buffers["integers"][self.warpgroup].astype(BF16)
            return self.part("right")
        steps = self.program.config.tile_columns // STEP
        for at in range(steps):
            if form == "words":
                pair = words[self.warpgroup, 2 * at], words[self.warpgroup, 2 * at + 1]
            else:
                pair = self.drawn(words[self.warpgroup, 3] + (self.across * steps + at).astype(jnp.uint32))
            self.buffers["right"][self.warpgroup, pl.ds(at * STEP, STEP)] = mosaic.unpack(*pair).astype(BF16)
        return mosaic.transpose(self.part("right"))

    def store(self, total: Array) -> None:
        """Copy the result out through shared memory, 64 columns at a time."""
        columns, result = self.program.config.tile_columns, self.buffers["result"]
        slots = result.shape[1]
        group = 2 * self.down + self.warpgroup
        for at in range(columns // 64):
            plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
            result[self.warpgroup, at % slots] = total[:, at * 64 : at * 64 + 64]
            plgpu.commit_smem()
            where = pl.ds(group * ROWS, ROWS), pl.ds(self.across * columns + at * 64, 64)
            plgpu.copy_smem_to_gmem(result.at[self.warpgroup, at % slots], self.program.out.at[where])


def _streamed(block: tuple[int, int], axis: int, dtype: Any, *, swizzle: int = 128) -> plgpu.BlockSpec:
    """A block that moves along one axis, step by step."""
    transforms = mosaic.tiling(block[1], dtype, swizzle=swizzle)
    index = (lambda k: (0, k)) if axis else (lambda k: (k, 0))
    return plgpu.BlockSpec(block, index, transforms=transforms, memory_space=plgpu.SMEM)
