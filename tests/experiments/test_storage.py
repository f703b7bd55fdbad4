"""What experiments read back: damage is one clear error, or what it damaged is made again."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eggroll.experiments.common import checkpoint, suite, warm_start
from eggroll.experiments.common.checkpoint import load_checkpoint, save_checkpoint, saved_shapes
from eggroll.experiments.common.run import exit_on_error, write_json
from eggroll.experiments.common.seed_runs import Setting, finished_seeds, launch_seeds
from eggroll.files import Damaged, read_object
from eggroll.journal.integrity import writing
from eggroll.llm import hf
from eggroll.llm.models.families import init_params

ROOT = Path(__file__).parents[2]
TREE = {"params": {"w": jnp.arange(24.0).reshape(4, 6), "b": jnp.zeros(6, jnp.bfloat16)}, "count": np.int64(7)}
LIKE = jax.tree.map(np.zeros_like, TREE)


def same(one, other):
    return all(
        np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True)
    )


def test_a_checkpoint_is_read_back_and_replaced(tmp_path):
    save_checkpoint(tmp_path / "c", LIKE)
    save_checkpoint(tmp_path / "c", TREE)
    assert same(load_checkpoint(tmp_path / "c", LIKE), TREE)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "none", LIKE)
    with pytest.raises(Damaged, match="cannot be read"):
        load_checkpoint(tmp_path / "c", {"other": np.zeros(3)})


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path):
    resource = pytest.importorskip("resource")
    save_checkpoint(tmp_path / "c", TREE)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="a checkpoint cannot be written"):
            save_checkpoint(tmp_path / "c", {"w": np.random.default_rng(0).normal(size=10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert same(load_checkpoint(tmp_path / "c", LIKE), TREE)
    save_checkpoint(tmp_path / "c", LIKE)
    assert same(load_checkpoint(tmp_path / "c", LIKE), LIKE) and [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("whole", range(4))
def test_a_kill_while_a_checkpoint_is_replaced_leaves_one_of_the_two(tmp_path, monkeypatch, whole):
    """The kill comes after `whole` steps of: remove what is left aside, move aside, rename, remove."""
    save_checkpoint(tmp_path / "c", TREE)
    steps = []

    def counted(call):
        def kill_or_call(*arguments, **options):
            if len(steps) == whole:
                raise KeyboardInterrupt
            steps.append(call)
            return call(*arguments, **options)

        return kill_or_call

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", counted(Path.rename))
        patched.setattr(checkpoint.shutil, "rmtree", counted(shutil.rmtree))
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path / "c", LIKE)
    assert (tmp_path / "c").exists() == (whole != 2)
    assert saved_shapes(tmp_path / "c") == [(), (4, 6), (6,)]
    assert same(load_checkpoint(tmp_path / "c", LIKE), LIKE if whole == 3 else TREE)
    save_checkpoint(tmp_path / "c", LIKE)
    assert same(load_checkpoint(tmp_path / "c", LIKE), LIKE) and [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_checkpoint_of_earlier_versions_is_read(tmp_path):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", jax.device_get(TREE), force=True)
    assert same(load_checkpoint(tmp_path / "c", LIKE), TREE)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # tasks that orbax abandons on damaged files
def test_no_flipped_bit_of_a_checkpoint_is_silent(tmp_path):
    save_checkpoint(tmp_path / "c", TREE)
    chance, found = random.Random(0), 0
    files = sorted(
        path.relative_to(tmp_path / "c") for path in (tmp_path / "c").rglob("*") if path.is_file() and path.stat().st_size
    )
    for name in files * 2:
        shutil.copytree(tmp_path / "c", tmp_path / "copy")
        data = bytearray((tmp_path / "copy" / name).read_bytes())
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        (tmp_path / "copy" / name).write_bytes(data)
        try:
            assert same(load_checkpoint(tmp_path / "copy", LIKE), TREE), name
        except Damaged as error:
            assert f"the checkpoint {tmp_path / 'copy'}" in str(error)
            found += 1
        shutil.rmtree(tmp_path / "copy")
    assert found >= 5


def test_json_has_a_checksum_of_its_values(tmp_path):
    path, values = tmp_path / "x.json", {"a": 1.5, "b": [1, None, "\u00e9"], "c": {"d": float("nan")}}
    write_json(path, values)
    assert read_object(path) == {**values, "c": {"d": None}}
    whole = path.read_bytes()
    for place in range(0, 8 * len(whole), 3):
        changed = bytearray(whole)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            read = read_object(path)
        except Damaged as error:
            assert str(path) in str(error)
        else:  # white space, or the name of the checksum
            assert {name: read[name] for name in values} == {**values, "c": {"d": None}}
    path.write_bytes(b"[" * 100_000)
    with pytest.raises(Damaged, match="nested too deeply"):
        read_object(path)


def test_a_seed_with_a_damaged_summary_is_run_again(tmp_path, capsys):
    setting = Setting(("a",), (), {"x": 1}, tmp_path)
    for seed in range(3):
        (tmp_path / f"seed-{seed}").mkdir()
        write_json(tmp_path / f"seed-{seed}/summary.json", {"options": {"x": 1}, "score": seed})
    path = tmp_path / "seed-1/summary.json"
    path.write_text(path.read_text().replace('"score": 1', '"score": 9'))
    (tmp_path / "seed-3").mkdir()
    (tmp_path / "seed-3/summary.json").write_text(json.dumps({"options": {"x": 1}, "score": 3}))  # of an earlier version
    assert finished_seeds(setting, range(5)) == {seed: {"score": seed} for seed in (0, 2, 3)}
    assert f"{path} is damaged, its run is resumed or repeated" in capsys.readouterr().out


def test_the_error_of_a_run_is_named_and_not_its_progress(tmp_path, monkeypatch):
    setting = Setting(("a",), ("-c",), {}, tmp_path)
    for ends, words in (
        ("echo error: no such thing >&2; echo env steps 120 of 1000 >&2; exit 1", "^no such thing$"),
        ("echo env steps 120 of 1000 >&2; kill -9 $$", "^it was killed by SIGKILL$"),
    ):
        (tmp_path / "python").write_text(f"#!/bin/sh\n{ends}\n")
        (tmp_path / "python").chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
        with pytest.raises(RuntimeError, match=words):
            launch_seeds("module", setting, [0])


def test_a_suite_goes_on_after_a_seed_of_other_options(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "launch_seeds", lambda *_: None)
    setting = Setting(("a",), (), {"sigma": 1}, tmp_path / "a")
    for seed, sigma in ((0, 2), (1, 1)):
        (tmp_path / f"a/seed-{seed}").mkdir(parents=True)
        write_json(tmp_path / f"a/seed-{seed}/summary.json", {"options": {"sigma": sigma}})
    jobs = [suite.Job(f"a seed {seed}", setting, [seed]) for seed in (0, 1)]
    run = suite._SuiteRun(suite.Suite("module", tmp_path, jobs, report=lambda results: suite.Report("", {}), partial=True))
    run.run_jobs()
    assert all("has a run with another sigma" in run.failed[name] for name in ("a seed 0", "a"))


@pytest.mark.usefixtures("standard_promotion")  # optax.adam relies on it
def test_a_warm_start_may_have_one_step():
    """Its warm-up is the whole of it, at a rate of 0."""
    params = {"w": jnp.ones(2)}
    tuned = warm_start.fit(params, lambda p, x: (p["w"] * x).sum(), lambda _: np.ones(2), steps=1, learning_rate=0.1)
    assert np.isfinite(tuned["w"]).all()


def test_a_damaged_warm_start_is_trained_again(tmp_path, capsys):
    pytest.importorskip("safetensors")
    config, trained = warm_start.byte_transformer(layers=1, width=16), []

    def train():
        trained.append(1)
        return init_params(config, key=jax.random.key(0))

    def start():
        return warm_start.cached_model(tmp_path / "cache", config, train, settings=[1], task="a test")

    folder = start()
    for name in ("model.safetensors", "config.json", "SHA256SUMS"):
        assert start() == folder
        data = bytearray((folder / name).read_bytes())
        data[-9] ^= 1
        (folder / name).write_bytes(data)
        capsys.readouterr()
        start()
        assert f"the model in {folder} is damaged" in capsys.readouterr().out
        hf.load(folder)
    assert len(trained) == 4


def test_a_warm_start_is_of_the_code_that_trains_it(tmp_path, monkeypatch):
    monkeypatch.setattr(warm_start.hf, "save", lambda *_: None)
    config, module = warm_start.byte_transformer(layers=1, width=16), tmp_path / "trainer.py"

    def folder_of(source):
        module.write_text(source)
        names = {}
        exec(compile(source, str(module), "exec"), names)
        return warm_start.cached_model(tmp_path / "cache", config, names["train"], settings=[1], task="a test")

    first, changed = "def train():\n    return 1\n", "def train():\n    return 2\n"
    assert folder_of(first) == folder_of(first) != folder_of(changed)


RUN = ["--env", "CartPole-v1", "--population-size", "64", "--env-steps", "60000", "--checks", "4", "--checkpoint-every", "2"]
LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))  # bytes of a file
sys.argv[1:] = sys.argv[2:]
runpy.run_module("eggroll.experiments.rl", run_name="__main__")
"""


def start(tmp_path, name, *more, limit=1 << 40):
    options = [*RUN, "--folder", str(tmp_path / name), *more]
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, "-c", LIMITED, str(limit), *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [900, 2000, 6000])
def test_a_run_that_cannot_write_says_so_in_one_line_and_resumes(tmp_path, limit):
    whole = start(tmp_path, "whole")
    ended = start(tmp_path, "run", limit=limit)
    *others, error = ended.stderr.splitlines()
    assert ended.returncode == 1 and error.startswith("error: [Errno ") and str(tmp_path / "run") in error, ended.stderr
    assert all(line.startswith("env steps ") or "the figure was not drawn" in line for line in others), ended.stderr
    resumed = start(tmp_path, "run", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    of_whole, of_run = (json.loads(done.stdout.splitlines()[-1]) for done in (whole, resumed))
    for name in ("mean_return", "generations", "env_steps"):
        assert of_whole[name] == of_run[name]


def test_errors_of_a_full_disk_name_the_folder_and_the_way_out(tmp_path, capsys):
    for error in (OSError(errno.ENOSPC, "No space left"), ValueError("RESOURCE_EXHAUSTED: ... No space left on device [x]")):
        words = "a checkpoint cannot be written: No space left"
        with pytest.raises(SystemExit, match=words) as ended, exit_on_error(), writing(tmp_path):
            raise error
        assert str(tmp_path) in str(ended.value) and "the same command with --resume continues" in str(ended.value)
    with pytest.raises(OSError, match="a checkpoint cannot be written: a line"), writing(tmp_path):
        raise RuntimeError("a line\nanother")
