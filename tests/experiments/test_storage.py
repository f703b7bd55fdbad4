"""What experiments read back: damage is one clear error, or what it damaged is made again."""

import json
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eggroll.experiments.common import warm_start
from eggroll.experiments.common.checkpoint import load_checkpoint, save_checkpoint
from eggroll.experiments.common.run import write_json
from eggroll.experiments.common.seed_runs import Setting, finished_seeds
from eggroll.files import Damaged, read_object
from eggroll.llm import hf
from eggroll.llm.models.families import init_params

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
    for name in [path.relative_to(tmp_path / "c") for path in files * 2]:
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
