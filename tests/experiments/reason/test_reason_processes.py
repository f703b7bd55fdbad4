"""`experiments.reason` over two devices and over two processes gives the run of one device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from eggroll.journal import Reader
from eggroll.llm import hf

ROOT = Path(__file__).parents[3]
DEVICES = "--xla_force_host_platform_device_count=2"
WAYS = {"mesh": ([], ["--mesh", "population=2"]), "launch": (["-m", "eggroll.launch", "2"], [])}


def start(folder, name, *options, launched=(), devices="", how="none"):
    command = [
        sys.executable,
        *launched,
        "-m",
        "tests.experiments.reason.reason_runs",
        how,
        *options,
        "--folder",
        f"out/{name}",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command, cwd=folder, env=environment | {"XLA_FLAGS": devices}, capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout, done.stderr


def run(folder, name, *options, **how):
    code, said, errors = start(folder, name, "--generations", "3", *options, **how)
    assert code == 0, errors
    return json.loads(said.splitlines()[-1])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    return folder, run(folder, "alone")


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_two_devices_and_two_processes_are_the_run_of_one(alone, way):
    folder, expected = alone
    launched, options = WAYS[way]
    summary = run(folder, way, *options, launched=launched, devices=DEVICES if way == "mesh" else "")
    for name in ("validation_accuracy", "test_accuracy", "test_accuracy_before", "tokens", "generations"):
        assert summary[name] == expected[name], name
    journals = [list(Reader(folder / f"out/{name}/journal.bin")) for name in ("alone", way)]
    for one, other in zip(*journals, strict=True):
        np.testing.assert_array_equal(one.coefficients, other.coefficients)
    params = (jax.tree.leaves(hf.load(folder / f"out/{name}/model")[2]) for name in ("alone", way))
    for one, other in zip(*params, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    assert len((folder / f"out/{way}/metrics.jsonl").read_text().splitlines()) == 4  # by one process; the last check has a line


@pytest.mark.slow
def test_the_first_process_keeps_the_clock(tmp_path):
    """The other one, whose clock is too slow, would wait for generations that the first one does not run any more."""
    code, said, errors = start(tmp_path, "clock", "--seconds", "1", launched=WAYS["launch"][0], how="clock")
    assert code == 0, errors
    assert json.loads(said.splitlines()[-1])["training_seconds"] >= 1


@pytest.mark.slow
def test_grpo_in_several_processes_is_refused(tmp_path):
    code, _, errors = start(tmp_path, "grpo", "--algorithm", "grpo", launched=WAYS["launch"][0])
    assert code == 1 and "error: grpo and a probe run in one process; eggroll runs in several.\n" in errors
