"""Files of checkpoints that are damaged, hostile or absurd: every loader loads them, or raises one clear error."""

import json
import random
import shutil
import subprocess
import time

import jax
import numpy as np
import pytest

from eggroll.llm import chat, hf
from tests.eggroll.llm import hostile_files
from tests.eggroll.llm.hostile_files import TEMPLATES, load_config, load_model, load_template, load_text, outcome
from tests.eggroll.llm.language_models import QWEN3, random_params, save_without_sums
from tests.tables import slow

pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of every family, without checksums."""
    root = tmp_path_factory.mktemp("hostile") / "folders"
    root.mkdir()
    hostile_files.make_folders(root)
    return root


def loaders():
    """Those whose packages are installed."""
    try:
        import jinja2  # noqa: F401
        import transformers  # noqa: F401
    except ImportError:
        return ("config", "model", "tokenizer")
    return tuple(hostile_files.LOADERS)


@pytest.mark.parametrize("inputs", [200, slow(5000)])
def test_mutated_files_load_or_are_refused_by_a_clear_error(folders, inputs):
    counts, bad = hostile_files.fuzz(folders, random.Random(inputs), inputs, loaders())
    print({"inputs": inputs, **counts, "unclear": counts["unclear"], "hangs": counts["hang"]})
    assert not bad
    assert counts["clear"] > inputs // 2 and counts["loaded"] > inputs // 20  # neither all fatal nor all harmless


def test_the_fuzzing_finds_unclear_errors_and_hangs(folders, monkeypatch):
    """The negative control."""
    assert outcome(lambda folder: {}["x"], folders)[0] == "unclear"
    assert outcome(lambda folder: json.loads("{"), folders)[0] == "unclear"  # a ValueError, but of another library
    monkeypatch.setattr(hostile_files, "LIMIT", 0.2)
    assert outcome(lambda folder: [time.sleep(0.01) for _ in range(10**6)], folders)[0] == "hang"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_hidden_layers": 10**30}, "'num_hidden_layers' in config.json must be an integer >= 1, below 2"),
        ({"num_hidden_layers": 1e30}, "'num_hidden_layers' in config.json must be an integer >= 1, got 1e"),
        ({"num_hidden_layers": 2**31 - 1}, "has no tensor 'model.layers.3"),
        ({"hidden_size": -16}, "'hidden_size' in config.json must be an integer >= 1, got -16"),
        ({"intermediate_size": 2**31 - 1}, "config.json expects "),
        ({"vocab_size": "50"}, "'vocab_size' in config.json must be an integer >= 1, got '50'"),
        ({"rms_norm_eps": float("inf")}, "'rms_norm_eps' in config.json must be a finite number > 0, got inf"),
        ({"tie_word_embeddings": "false"}, "'tie_word_embeddings' in config.json must be true or false, got 'false'"),
        ({"model_type": ["qwen3"]}, "model_type in .* must be one of"),
        ({"layer_types": [{}]}, "'layer_types' in config.json has {}"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, "rotary positions must be of type"),
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_allocated(tmp_path, monkeypatch, fields, words):
    folder = save_without_sums(tmp_path, QWEN3)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    monkeypatch.setattr(hf, "read_resident", None)
    with pytest.raises(ValueError, match=words):
        hf.load(folder)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "a\0b", "x" * 300])
def test_a_weight_map_names_files_of_its_folder(tmp_path, name):
    folder = save_without_sums(tmp_path / "model", QWEN3)
    shutil.move(folder / "model.safetensors", tmp_path / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(ValueError, match=r"'weight_map' of .* must name files of the folder, got"):
        hf.load(folder)


def test_tensors_must_be_floats(tmp_path):
    from safetensors.numpy import load_file, save_file

    path = save_without_sums(tmp_path, QWEN3) / "model.safetensors"
    save_file({name: value.view(np.int32) for name, value in load_file(path).items()}, path)
    with pytest.raises(ValueError, match=r"tensor 'model.embed_tokens.weight' must be of F64, F32, F16, BF16, got I32"):
        hf.load(tmp_path)


@pytest.mark.parametrize("template", TEMPLATES, ids=range(len(TEMPLATES)))
def test_a_chat_template_has_a_limit(folders, tmp_path, template, monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip("jinja2")
    monkeypatch.setattr(chat, "SECONDS", 0.3)
    folder = shutil.copytree(folders / "opt", tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template)
    result, error = outcome(load_template, folder)
    assert result == "clear", error
    if "range(99999)" in template or "999999999)" in template:
        assert "it took more than 0.3 seconds for a prompt" in str(error)


# --- SHA256SUMS ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(folders, tmp_path_factory):
    """A model in shards, with a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    return hf.save(folder, QWEN3, random_params(QWEN3), source=folders / "qwen3-yarn", max_shard_bytes=8000)


def load_all(folder):
    load_text(folder)
    params = hf.load(folder)[2]
    if "template" in loaders():
        load_template(folder)
    return params


def test_sha256sum_agrees(exported, tmp_path):
    listed = (exported / "SHA256SUMS").read_text().splitlines()
    assert {line[66:] for line in listed} == {path.name for path in exported.iterdir()} - {"SHA256SUMS"}
    subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=exported, check=True, capture_output=True)
    folder = shutil.copytree(exported, tmp_path / "model")
    hf.save(folder, QWEN3, random_params(QWEN3))  # as one file, without a source: the tokenizer's lines stay
    assert (folder / "SHA256SUMS").read_text().count("tokenizer") == 2
    subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=folder, check=True, capture_output=True)


@pytest.mark.parametrize("flips", [40, slow(1000)])
def test_no_flipped_bit_loads_silently(exported, tmp_path, flips):
    chance, expected, found = random.Random(flips), load_all(exported), 0
    for index in range(flips):
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(exported, folder)
        unread = () if "template" in loaders() else ("chat_template.jinja", "tokenizer_config.json")
        files = sorted(file for file in folder.iterdir() if file.name not in unread)
        path = files[index % len(files)]
        data = bytearray(path.read_bytes())
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        result, error = outcome(lambda folder: jax.tree.map(np.testing.assert_array_equal, load_all(folder), expected), folder)
        assert result == "clear" or (result == "loaded" and path.name == "SHA256SUMS"), (path.name, error)
        if path.name != "SHA256SUMS":
            assert f"{path} is damaged: it differs from its line in SHA256SUMS" in str(error)
        found += result == "clear"
    assert found > 0.8 * flips


def test_an_edit_on_purpose_needs_its_line_removed(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "model")
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"max_position_embeddings": 32768', '"max_position_embeddings": 64'))
    with pytest.raises(ValueError, match=r"config.json is damaged: .* If it was edited on purpose, remove that line"):
        load_config(folder)
    sums = folder / "SHA256SUMS"
    sums.write_text("".join(line for line in sums.read_text().splitlines(keepends=True) if "config.json" not in line[66:77]))
    assert hf.read_config(folder).max_position_embeddings == 64
    load_model(folder)
    sums.write_text("x" * 70)
    with pytest.raises(ValueError, match=r"SHA256SUMS is damaged: line 1 is not a checksum. Remove it to load anyway"):
        load_config(folder)
