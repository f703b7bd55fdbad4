"""The benchmark of memory, in small: its numbers belong together, and what it lacks is a clear error."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

from eggroll.experiments.bench.memory import command, described, measured, models, optimizers, programs, rows
from eggroll.experiments.bench.memory.options import Memory, check

ROOT = Path(__file__).parents[3]
NEEDS_COMPILER = pytest.mark.skipif(
    not all(map(described.is_installed, described.PACKAGES)), reason="needs `make cuda-compiler` and its environment"
)


WORK = ({"w": jax.ShapeDtypeStruct((4, 3), jnp.bfloat16)}, jax.ShapeDtypeStruct((8, 3), jnp.bfloat16), 1)


def tiny_generation(**options):
    work = models.mlp(layers=2, width=8, hidden=16, vocab=32)
    return programs.make_generation(work, members=8, optimizer=optax.sgd(1e-3), precision="stochastic", **options)


def test_last_line_is_json_with_ratios_of_the_compiled_update(capsys, standard_promotion):
    command.run(Memory(small=True, members=8, precisions=("master",), optimizers=("sgd",)))
    *lines, last = capsys.readouterr().out.splitlines()
    summary = json.loads(last)
    row = summary["cpu"]["master_sgd"]
    assert lines[2].split()[0] == "precision" and lines[3].startswith("master + sgd") and set(summary) == {"cpu", "about"}
    assert row["parameter_bytes"] == 2 * (256 * 64 + 2 * 2 * 64 * 128) and row["state_bytes"] == 3 * row["parameter_bytes"]
    assert row["peak_bytes"] == row["arguments"] + row["results"] - row["aliases"] + row["temporaries"]
    assert row["ratio"] == pytest.approx(row["peak_bytes"] / row["parameter_bytes"]) == pytest.approx(3 * row["state_ratio"])
    assert row["aliases"] >= row["state_bytes"], "the state is donated"


@pytest.mark.parametrize("program", ["plain", "generation"])
def test_a_program_runs_as_compiled(program, standard_promotion):
    """On a device that counts no bytes the measured figure is missing."""
    work = models.Workload(lambda params, x, key=None: jnp.sum(params["w"] * x), *WORK)
    generation = programs.make_generation(work, members=8, optimizer=optax.sgd(1e-3), precision="stochastic")
    row = measured.measure(generation, program)
    assert tuple(row["usage"]) == measured.PROGRAMS[program] and row["measured_gb"] is None
    sizes = [programs.Usage(**usage) for usage in row["usage"].values()]
    assert row["predicted_gb"] == max(size.peak for size in sizes) / rows.GIGA and row["implementation"] == "reference"


def test_a_program_that_cannot_be_compiled_says_why():
    generation = tiny_generation()
    broken = rows.compile_program(generation, "update", platform="no such platform")
    assert broken.usage is None and "no such platform" in broken.failed
    found = {name: broken for name in rows.PROGRAMS}
    row = rows.generation_row(generation, found)
    assert row["peak_gb"] is None and row["overhead"] is None and set(row["failed"]) == set(rows.PROGRAMS)


def test_moments_in_bfloat16_take_half_and_give_the_same_first_step(standard_promotion):
    params = {"w": jnp.ones((4, 3), jnp.float32)}
    updates = jax.tree.map(lambda leaf: 0.5 * leaf, params)
    short, wide = optimizers.OPTIMIZERS["adam_bfloat16"], optimizers.OPTIMIZERS["adam"]
    halves, floats = short.init(params), wide.init(params)
    assert programs.tree_bytes(halves) - 4 == (programs.tree_bytes(floats) - 4) / 2  # int32 count
    (moved, halves), (expected, _) = short.update(updates, halves, params), wide.update(updates, floats, params)
    assert jnp.array_equal(moved["w"], expected["w"]) and halves[0].nu["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"target": "h100", "precisions": ("master",)}, "--precisions has no effect with --target h100: it belongs to cpu"),
        ({"layers": 2}, "--layers has no effect with --target cpu: it belongs to cpux8, h100, h100x8 and gpu"),
        ({"target": "h100", "program": "plain"}, "--program has no effect with --target h100: it belongs to gpu"),
        ({"target": "h100", "models": ("3b",)}, "models must be among tiny, 1b, 7b, 70b, got 3b"),
        ({"precisions": ("exact",)}, "precisions must be among master, stochastic, nearest, feedback, got exact"),
        ({"optimizers": ("lion",)}, "optimizers must be among sgd, adam, adam_bfloat16, got lion"),
        ({"members": 7}, "members must be an even integer >= 2, got 7"),
        ({"target": "h100", "layers": 0}, "layers must be an integer >= 1, got 0"),
    ],
)
def test_wrong_options_are_refused_by_a_clear_error(options, sentence):
    with pytest.raises(SystemExit, match=f"error: {sentence}"):
        check(Memory(**options))


@pytest.mark.parametrize("target", ["h100", "h100x8"])
def test_missing_compiler_is_a_clear_error(target, monkeypatch):
    monkeypatch.setattr(described, "PACKAGES", ("no_such_package.part",))
    with pytest.raises(SystemExit, match=r"error: .*no_such_package\.part.*not installed.*`make cuda-compiler`"):
        command.run(Memory(target=target))


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there the programs run")
def test_a_program_that_cannot_run_is_a_row_that_says_why(capsys, monkeypatch):
    failed = {"failed": "error: out of memory"}
    monkeypatch.setattr(measured, "_run_in_process", lambda config, name, program: failed)
    with pytest.raises(SystemExit, match="error: 2 of 2 rows could not be compiled or run"):
        command.run(Memory(target="gpu", models=("tiny",)))
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines[-1].split(maxsplit=2) == ["tiny", "generation", "error: out of memory"]
    assert json.loads(last) == {"gpu": {"tiny": {"plain": failed, "generation": failed}}}


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there it runs")
def test_a_program_needs_a_gpu():
    with pytest.raises(SystemExit, match="error: target gpu needs a GPU that JAX can use, the default backend is cpu"):
        command.run(Memory(target="gpu", models=("tiny",), program="plain"))


def run_in_process(*options):
    command = [sys.executable, "-m", "experiments.bench", "memory", "--models", "tiny", "--members", "8", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_generation_over_eight_virtual_devices():
    summary = run_in_process("--target", "cpux8")["cpux8"]
    assert list(summary) == ["tiny, population 1, model 8", "tiny, population 2, model 4"]
    for row in summary.values():
        assert not row["failed"] and row["peak_gb"] == max(row["evaluate_gb"], row["update_gb"])
        assert sum(row["crossing"]["evaluate"].values()) > 0
    assert summary["tiny, population 2, model 4"]["predicted_crossing"]["update"] == row["parameters"]


@pytest.mark.slow
@NEEDS_COMPILER
def test_generation_for_a_described_gpu():
    row = run_in_process("--target", "h100")["h100"]["tiny"]
    assert not row["failed"] and row["overhead"] == pytest.approx(row["peak_gb"] / row["plain_gb"])
