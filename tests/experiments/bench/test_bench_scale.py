"""The benchmark of meshes: the bytes it reads, and a run of no size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from eggroll.experiments.bench import scale
from eggroll.experiments.bench.collectives import collective_bytes, executed_collective_bytes, largest_collective

ROOT = Path(__file__).parents[3]
HLO = """
  %all-reduce = (f32[128]{0}, f32[64,128]{1,0}) all-reduce(%a, %b), channel_id=1, to_apply=%sum
  %all-gather.1 = bf16[32,2]{1,0} all-gather(%c), channel_id=2, dimensions={0}
  %all-gather.2 = (u32[], u32[]) all-gather-start(%c), channel_id=3
  %all-gather.3 = u32[] all-gather-done(%all-gather.2)
  %done = f32[64]{0} fusion(%all-reduce), metadata={op_name="all-reduce"}
  %flags = pred[16]{0} collective-permute(%d)
"""


def test_bytes_of_every_kind_of_collective():
    assert collective_bytes(HLO) == {"all-reduce": 4 * (128 + 64 * 128), "all-gather": 2 * 64 + 4, "collective-permute": 16}
    assert largest_collective(HLO, "all-gather") == 128 and largest_collective(HLO, "reduce-scatter") == 0


def test_collectives_in_a_loop_count_as_often_as_it_runs():
    hlo = """HloModule jit_f

%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  ROOT %all-reduce.1 = f32[8]{0} all-reduce(%x), channel_id=1, to_apply=%sum
}

%unknown (p: f32[2]) -> f32[2] {
  %all-gather = f32[2]{0} all-gather(%p), channel_id=2
}

ENTRY %main.3 (a: f32[8]) -> f32[8] {
  %while.1 = (s32[], f32[8]) while(%t), condition=%cond, body=%body.1, backend_config={"known_trip_count":{"n":"5"}}
  %while.2 = f32[2] while(%t), condition=%cond, body=%unknown
  ROOT %all-reduce.2 = f32[8]{0} all-reduce(%y), channel_id=3, to_apply=%sum
}
"""
    assert executed_collective_bytes(hlo) == {"all-reduce": 32 * 6, "all-gather": 8}
    assert collective_bytes(hlo) == {"all-reduce": 32 * 2, "all-gather": 8}


@pytest.mark.slow
def test_last_line_is_json_and_the_cost_model_holds():
    tiny = "scale.Scale(devices=2, members=16, width=8, examples=4, chunk_size=2, growths=(2, 8))"
    command = [sys.executable, "-c", f"from experiments.bench import scale; scale.run({tiny})"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["devices"] == 2 and summary["about"]["device"] == "2 x cpu"
    assert summary["update_difference"] <= 1e-5 and summary["fitness_difference"] <= 1e-6
    assert summary["collective_bytes"].keys() == summary["meshes"].keys()
    whole = summary["meshes"]["population 2"]
    assert whole["collective_total"] == whole["predicted_bytes"]
    small, large = summary["peak_bytes"].values()
    assert large - small < 128 * (8 - 2) * 16  # scalars of a member, not its activations


def test_odd_devices_are_refused():
    with pytest.raises(SystemExit, match="error: devices must be a multiple of 2, got 3"):
        scale.run(scale.Scale(devices=3))
