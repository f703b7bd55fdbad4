"""Models are loaded and saved tensor by tensor: files, shards, kills at any moment, memory."""

import dataclasses
import filecmp
import json
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eggroll.llm import hf, stacks
from eggroll.llm.export import write_file
from eggroll.llm.int8 import dequantise, dequantise_matrix, quantise
from eggroll.llm.models.families import family_of
from eggroll.llm.models.rotary import Rotary
from eggroll.llm.shards import INDEX, SINGLE, Shards
from eggroll.llm.stacks import Tensor, stored_tensors
from tests.eggroll.llm.host_memory import BILLION, write_random
from tests.eggroll.llm.language_models import LLAMA, OPT, QWEN3, RWKV7, inputs, logits_of, random_params, reference_logits
from tests.tables import by_default

pytest.importorskip("safetensors")
FAMILIES = {"llama": LLAMA, "opt": OPT, "rwkv7": RWKV7}
OTHER = dataclasses.replace(LLAMA, rotary=Rotary(7.0))
SHARDED = dataclasses.replace(LLAMA, num_hidden_layers=4)
SHARD = 4000  # bytes; the small model has several times more


def equal(one, other):
    return all(np.array_equal(*leaves) for leaves in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_a_file_has_the_bytes_that_safetensors_writes(config, dtype, tmp_path, monkeypatch):
    from safetensors.numpy import load_file, save

    monkeypatch.setattr(stacks, "PIECE", 40)  # two rows of a matrix
    hf.save(tmp_path, config, random_params(config, dtype))
    tensors = load_file(tmp_path / SINGLE)
    assert (tmp_path / SINGLE).read_bytes() == save(tensors, metadata={"format": "pt"})
    for name, leaf in family_of(config).leaves(config).blocks.items():
        value = np.asarray(random_params(config, dtype)["blocks"][name])[2]
        expected = value.T if leaf.transposed else value.reshape(leaf.stored_shape)
        np.testing.assert_array_equal(tensors[leaf.tensor.format(layer=2)], expected)


@pytest.mark.parametrize("weights", ["float", "int8"])
@pytest.mark.parametrize("family", by_default(FAMILIES, "llama", "opt"))
def test_a_model_is_read_in_pieces(family, weights, tmp_path, monkeypatch):
    config = FAMILIES[family]
    hf.save(tmp_path, config, random_params(config, jnp.bfloat16))
    whole = random_params(config, jnp.bfloat16)
    leaves = family_of(config).leaves(config)
    expected = quantise(leaves, whole) if weights == "int8" else whole
    sizes, read_pieces = [], Shards.read_pieces

    def counted(self, *args, **kwargs):
        for start, piece in read_pieces(self, *args, **kwargs):
            sizes.append(piece.size)
            yield start, piece

    monkeypatch.setattr(Shards, "read_pieces", counted)
    monkeypatch.setattr(stacks, "PIECE", 70)
    found = hf.load(tmp_path, jnp.bfloat16, weights=weights)[2]
    assert jax.tree.structure(found) == jax.tree.structure(expected) and max(sizes) <= 70 < 16 * 16
    for name, leaf in leaves.blocks.items():
        for got, wanted in zip(jax.tree.leaves(found["blocks"][name]), jax.tree.leaves(expected["blocks"][name]), strict=True):
            assert got.dtype == wanted.dtype
            np.testing.assert_array_equal(got[leaf.first_layer :], wanted[leaf.first_layer :])
    assert equal(found["resident"], expected["resident"])


def test_the_writer_holds_one_piece_at_a_time(tmp_path):
    alive, most = weakref.WeakSet(), []

    class Counted(np.ndarray):
        __hash__ = object.__hash__

    def pieces():
        for _ in range(5):
            piece = np.zeros((2, 3), np.float32).view(Counted)
            alive.add(piece)
            most.append(len(alive))
            yield piece
            del piece

    write_file(tmp_path / SINGLE, [Tensor(name, np.dtype(np.float32), (10, 3), pieces) for name in "abc"])
    assert len(most) == 15 and max(most) <= 2  # the one that was written, and its successor
    with pytest.raises(ValueError, match=r"tensor 'a' has 120 bytes, expected 132"):
        write_file(tmp_path / SINGLE, [Tensor("a", np.dtype(np.float32), (11, 3), pieces)])
    with pytest.raises(ValueError, match="parameters must be of float64, float32, float16, bfloat16 to be saved, got int32"):
        write_file(tmp_path / SINGLE, [Tensor("a", np.dtype(np.int32), (10, 3), pieces)])


def test_int8_matrices_become_floats_layer_by_layer(tmp_path, monkeypatch):
    params, shapes = quantise(family_of(LLAMA).leaves(LLAMA), random_params(LLAMA)), []
    monkeypatch.setattr(stacks, "dequantise_matrix", lambda w: shapes.append(w["int8"].shape) or dequantise_matrix(w))
    hf.save(tmp_path, LLAMA, params)
    assert len(shapes) == 7 * 3 and {len(shape) for shape in shapes} == {2}
    assert equal(hf.load(tmp_path)[2], dequantise(params))


@pytest.mark.parametrize("axes", [(), ("x",), (None, "x"), (None, None, "x")], ids=["replicated", "layers", "rows", "columns"])
def test_a_model_over_several_devices_is_saved(axes, tmp_path):
    params = random_params(SHARDED)
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])

    def place(leaf):
        spec = jax.sharding.PartitionSpec(*axes[: leaf.ndim])
        return jax.device_put(leaf, jax.sharding.NamedSharding(mesh, spec))

    hf.save(tmp_path, SHARDED, jax.tree.map(place, params))
    assert equal(hf.load(tmp_path)[2], params)


def test_a_large_model_has_several_files(tmp_path):
    params = random_params(LLAMA)
    hf.save(tmp_path, LLAMA, params, max_shard_bytes=SHARD)
    index = json.loads((tmp_path / INDEX).read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    tensors = {tensor.name: tensor for tensor in stored_tensors(family_of(LLAMA).leaves(LLAMA), params)}
    assert index["weight_map"].keys() == tensors.keys() and {*index["weight_map"].values()} == {*files}
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    for name in files:
        assert sum(tensors[key].nbytes for key, own in index["weight_map"].items() if own == name) <= SHARD
    assert len(files) > 5 and equal(hf.load(tmp_path)[2], params)
    hf.save(tmp_path, LLAMA, params, max_shard_bytes=1)
    assert len([*tmp_path.glob("*.safetensors")]) == len(tensors) and equal(hf.load(tmp_path)[2], params)
    with pytest.raises(ValueError, match="max_shard_bytes must be an integer >= 1, got 0"):
        hf.save(tmp_path, LLAMA, params, max_shard_bytes=0)
    with pytest.raises(ValueError, match="weights must be 'float' or 'int8', got 'int4'"):
        hf.load(tmp_path, weights="int4")


class Killed(BaseException):
    """Stands for the end of the process."""


def kill_before(monkeypatch, step):
    """Raise instead of the given change of the file system."""
    left = [step]

    def counted(name, change):
        def changed(self, *args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return change(self, *args, **kwargs)

        monkeypatch.setattr(Path, name, changed)

    for name in ("replace", "unlink", "write_bytes"):
        counted(name, getattr(Path, name))


@pytest.mark.parametrize("new", [1 << 30, SHARD], ids=["to-one", "to-several"])
@pytest.mark.parametrize("old", [1 << 30, SHARD], ids=["one", "several"])
def test_a_kill_at_any_moment_leaves_no_mixture(old, new, tmp_path, monkeypatch):
    older, newer = random_params(LLAMA), jax.tree.map(lambda leaf: leaf + 1, random_params(LLAMA))
    hf.save(tmp_path / "old", LLAMA, older, max_shard_bytes=old)
    seen = []
    for step in range(100):
        folder = shutil.copytree(tmp_path / "old", tmp_path / str(step))
        with monkeypatch.context() as patch:
            kill_before(patch, step)
            try:
                hf.save(folder, OTHER, newer, max_shard_bytes=new)
                break
            except Killed:
                pass
        try:
            config, _, params = hf.load(folder)
            seen.append("old" if config == LLAMA else "new")
            assert equal(params, older if config == LLAMA else newer)
        except FileNotFoundError as error:
            seen.append("none")
            assert "has no config.json" in str(error)
    assert seen == sorted(seen, key=["old", "none", "new"].index) and {*seen} == {"old", "none"}
    again = tmp_path / str(step // 2)
    for path in (folder, hf.save(again, OTHER, newer, max_shard_bytes=new)):
        assert hf.load(path)[0] == OTHER and equal(hf.load(path)[2], newer)
        assert not [*path.glob("*.partial")] and (path / SINGLE).exists() != (path / INDEX).exists()
        assert len([*path.glob("*.safetensors")]) == len([*folder.glob("*.safetensors")])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_several_files(tmp_path):
    hf.save(tmp_path, QWEN3, random_params(QWEN3), max_shard_bytes=SHARD)
    tokens, mask = inputs()
    got = logits_of(QWEN3, random_params(QWEN3), tokens, mask)
    np.testing.assert_allclose(got[mask], reference_logits(tmp_path, tokens, mask)[mask], atol=1e-4)


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("weights", ["float", "int8"])
def test_a_billion_parameters_take_their_own_memory_and_a_tensor(weights, tmp_path):
    """A process loads and saves 1.1e9 bfloat16 numbers; 256 MiB are for pieces, programs and what the allocator keeps."""
    source, out = tmp_path / "source", tmp_path / "out"
    write_random(source, BILLION)
    command = [sys.executable, "-m", "tests.eggroll.llm.host_memory", source, weights, out]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    files = [*source.glob("*.safetensors*")]
    same = [filecmp.cmp(path, out / path.name, shallow=False) for path in files]
    shutil.rmtree(tmp_path)
    assert found["model"] > (2000 if weights == "float" else 1000)
    assert found["saved"] >= found["loaded"] > 0.9 * found["model"]
    assert found["saved"] <= found["model"] + found["tensor"] + 256
    assert len(files) == 4 and (weights == "int8" or all(same))
