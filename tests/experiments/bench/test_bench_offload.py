"""The benchmark of offloading: its bytes against a count by hand, its reader of schedules, and its programs against a step."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from eggroll import zo
from eggroll.experiments.bench.collectives import executed_collective_bytes
from eggroll.experiments.bench.memory import described
from eggroll.experiments.bench.memory.programs import Usage, usage
from eggroll.experiments.bench.offload import command, model, one_program, programs, schedule
from eggroll.experiments.bench.offload.schedule import Transfer
from eggroll.zo.offload import passes
from tests.zo import tiny_blocks

ROOT = Path(__file__).parents[3]
NEEDS_COMPILER = pytest.mark.skipif(
    not all(map(described.is_installed, described.PACKAGES)), reason="needs `make cuda-compiler` and its environment"
)
TINY = model.SIZES["tiny"]
MATRICES = 4 * 64 * 64 + 2 * 64 * 256  # entries of q, k, v and o, of up and down
VECTORS = [64] * 9 + [256]  # biases of all six and two layer norms
BLOCK = 2 * (MATRICES + sum(VECTORS))  # bytes in bfloat16
ON_FOUR = BLOCK + 9 * 2 * 3 * 64  # a slice holds at least 64 values, so vectors of 64 take 256


@functools.cache
def tiny_step(devices):
    return model.make_step(TINY, model.mesh_of(jax.devices()[:devices]), tokens=16)


@pytest.mark.slow
def test_bytes_of_a_block_by_hand():
    step = tiny_step(4)
    assert programs.slice_bytes(step) == ON_FOUR // 4
    assert step.num_blocks == 4 and step.batch.shape == (2, 16)
    streams = 4 * (1 + 1) * 16 * 64 * 2  # each of four devices has one text, perturbed and as it began
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(step.carry)) == streams


@pytest.mark.slow
def test_bytes_on_a_device_are_those_of_a_program_and_of_what_lies_there_meanwhile():
    step = tiny_step(4)
    resident = 2 * (256 * 64 + 66 * 64 + 2 * 64)  # embedding, positions, final norm
    streams, mask = (1 + 1) * 16 * 64 * 2, 16 * 16
    found = {name: programs.device_bytes(step, name, Usage(100, 10, 5, 1000)) for name in programs.OTHER_BLOCKS}
    blocks = 2 * ON_FOUR // 4
    assert found["begin"] == found["update_resident"] == 1105 and found["end"] == 1105 + blocks
    assert found["visit"] == 1105 + blocks + resident and found["update_block"] == 1105 + blocks + resident + streams + mask


SCHEDULE = """HloModule step, is_scheduled=true

%product (a: bf16[8,8], b: bf16[8,8]) -> bf16[8,8] {
  %a = bf16[8,8]{1,0} parameter(0)
  %b = bf16[8,8]{1,0} parameter(1)
  ROOT %dot.1 = bf16[8,8]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%read (stack: bf16[4,64], i: s32[]) -> bf16[1,64] {
  %stack = bf16[4,64]{1,0:S(5)} parameter(0)
  %i = s32[] parameter(1)
  ROOT %slice = bf16[1,64]{1,0} dynamic-slice(%stack, %i, %i), dynamic_slice_sizes={1,64}
}

%body (loop: (s32[], bf16[4,64], bf16[8,8])) -> (s32[], bf16[4,64], bf16[8,8]) {
  %loop = (s32[], bf16[4,64]{1,0:S(5)}, bf16[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%loop), index=0
  %stack = bf16[4,64]{1,0:S(5)} get-tuple-element(%loop), index=1
  %x = bf16[8,8]{1,0} get-tuple-element(%loop), index=2
  %all = bf16[4,64]{1,0:S(5)} copy(%stack)
  %start = ((bf16[4,64]{1,0:S(5)}, s32[]), bf16[1,64]{1,0}, u32[]) fusion-start(%all, %i), kind=kCustom, calls=%read
  %new = bf16[1,64]{1,0} bitcast(%x)
  %back = ((bf16[4,64]{1,0:S(5)}, bf16[1,64]{1,0}, s32[]), bf16[4,64]{1,0:S(5)}, u32[]) fusion-start(%all, %new, %i)
  %end.1 = bf16[4,64]{1,0:S(5)} fusion-done(%back)
  %gather = (bf16[16]{0}, bf16[64]{0}) all-gather-start(%x), dimensions={0}
  %y = bf16[8,8]{1,0} fusion(%x, %x), kind=kCustom, calls=%product
  %z = bf16[8,8]{1,0} fusion(%y, %x), kind=kCustom, calls=%product
  %gathered = bf16[64]{0} all-gather-done(%gather)
  %end.2 = bf16[1,64]{1,0} fusion-done(%start)
  %late = bf16[1,64]{1,0} fusion(%all, %i), kind=kLoop, calls=%read
  ROOT %out = (s32[], bf16[4,64]{1,0:S(5)}, bf16[8,8]{1,0}) tuple(%i, %end.1, %z)
}

ENTRY %main (w: bf16[4,64]) -> bf16[4,64] {
  %w = bf16[4,64]{1,0:S(5)} parameter(0)
  %while = (s32[], bf16[4,64]{1,0:S(5)}, bf16[8,8]{1,0}) while(%w), condition=%no, body=%body
  ROOT %done = bf16[4,64]{1,0:S(5)} get-tuple-element(%while), index=1
}
"""


def test_a_schedule_says_which_copies_span_products():
    transfers = schedule.block_transfers(SCHEDULE)
    assert transfers == [
        Transfer("host copy", 512, 0),
        Transfer("upload", 128, 2),
        Transfer("download", 128, 0),
        Transfer("gather", 128, 2),
        Transfer("upload", 128, 0),
    ]
    assert command.spanning(transfers, "upload") == {"bytes": 256, "spanning": 0.5}
    with pytest.raises(ValueError, match="no loop with a matrix product"):
        schedule.block_transfers(SCHEDULE.replace("dot(", "add("))


def test_wrong_options_and_a_missing_compiler_are_clear_errors(monkeypatch):
    with pytest.raises(SystemExit, match=r"error: tokens must be between 2 and the 64 positions of the model, got 65\."):
        command.run(command.OffloadBench(model="tiny", tokens=65))
    monkeypatch.setattr(described, "PACKAGES", ("no_such_package.part",))
    with pytest.raises(SystemExit, match=r"error: .*no_such_package\.part.*make cuda-compiler.*bench offload"):
        command.run(command.OffloadBench(model="tiny", tokens=16))


@pytest.mark.slow
def test_compiled_programs_take_and_send_the_bytes_counted_by_hand():
    step = tiny_step(4)
    compiled = {name: function.lower(*shapes).compile() for name, (function, shapes) in programs.programs_of(step).items()}
    sent = {name: executed_collective_bytes(found.as_text()) for name, found in compiled.items()}
    assert sent["visit"] in ({"all-gather": ON_FOUR}, {"all-gather": 2 * ON_FOUR}), "CPUs may send bfloat16 as float32"
    assert sum(sent["begin"].values()) == 0 and sum(sent["end"].values()) < 100
    assert sum(sent["update_block"].values()) == 2 * 16 * 4, "checksums of 16 parameters, before and after"
    updated = usage(compiled["update_block"])
    pending = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(step.state.pending))
    assert updated.arguments == ON_FOUR // 4 + pending + 8 + 4, "with the key and the number of the block"
    assert updated.aliases == ON_FOUR // 4


def host_of_cpu(mesh, spec):
    return NamedSharding(mesh, spec, memory_kind="pinned_host")


@pytest.mark.slow
@pytest.mark.parametrize("form", one_program.FORMS)
def test_a_step_as_one_program_is_a_step(form):
    away = zo.Offload(zo.mezo(tiny_blocks.PIECES, learning_rate=0.1, sigma=1e-2))
    state, _ = away.step(away.init(tiny_blocks.init(), key=jax.random.key(1)), tiny_blocks.BATCH)
    batch = away.devices.batch(tiny_blocks.BATCH)
    streams = away.streams_of(away.plan(state, batch), state.shapes)
    resident, _ = passes.program(streams, "update_resident")(state.pending, state.key, state.resident)
    small, before = state._replace(resident=resident, blocks=()), jax.tree.map(np.asarray, state.blocks)
    like = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)  # noqa: E731
    step = model.Step(streams, *jax.tree.map(like, (small, state.blocks[0], batch)), carry=(), aux=(), num_blocks=4)
    function, (_, shapes, _) = one_program.make_program(step, form, host=host_of_cpu)
    count = one_program.FORMS[form]
    stack = lambda shape, *leaves: jax.device_put(np.stack(leaves), shape.sharding)  # noqa: E731
    stacks = tuple(jax.tree.map(stack, shapes[first], *before[first::count]) for first in range(count))
    new, coefficients = function(small, stacks, batch)
    after, metrics = away.step(state, batch)
    np.testing.assert_allclose(coefficients, metrics.coefficients, rtol=1e-2)
    for index, block in enumerate(after.blocks):
        found = jax.tree.map(lambda leaf, at=index // count: leaf[at], new[index % count])
        for ours, theirs, old in zip(*map(jax.tree.leaves, (found, block, before[index])), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
            assert not np.array_equal(ours, old)


@pytest.mark.slow
@NEEDS_COMPILER
def test_described_gpus():
    options = ("offload", "--model", "tiny", "--tokens", "16")
    done = subprocess.run(
        [sys.executable, "-m", "experiments.bench", *options], cwd=ROOT, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])["offload"]
    assert found["1"]["step_crossing"] == {} and found["4"]["crossing"]["visit"] == {"all-gather": ON_FOUR}
    for count, block in (("1", BLOCK), ("4", ON_FOUR // 4)):
        best = found[count]["one_program"][command.BEST]
        assert best["transfers"]["upload"] == best["transfers"]["download"] == {"bytes": 2 * block, "spanning": 1.0}
        assert best["host_temporaries"] == 0 and best["host_bytes"] == 4 * block
    assert found["1"]["one_program"]["scan"]["host_bytes"] == 8 * BLOCK
