"""Models of whole texts: equal to transformers, right under padding, low-rank noise of matrices, errors of one sentence."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll
from eggroll.llm import hf
from eggroll.llm.decoder import apply
from eggroll.llm.models.families import family_of
from eggroll.llm.models.rotary import Rotary
from tests.eggroll.llm.language_models import (
    OPT,
    QWEN3,
    RWKV7,
    TRANSFORMERS,
    inputs,
    logits_of,
    random_params,
    reference,
    reference_logits,
    save_without_sums,
)
from tests.tables import by_default, slow

pytest.importorskip("safetensors")

CONFIGS = {
    "opt": OPT,
    "opt-untied": dataclasses.replace(OPT, tie_word_embeddings=False),
    "opt-post-norm": dataclasses.replace(OPT, do_layer_norm_before=False, word_embed_proj_dim=8),
    **{name: TRANSFORMERS[name] for name in ("qwen3", "qwen3-tied", "qwen3-bias", "qwen2", "llama-bias")},
}
all_configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sharded", [False, True], ids=["one-file", "sharded"])
@all_configs
def test_logits_equal_those_of_transformers(config, sharded, tmp_path):
    hf.save(tmp_path / "ours", config, random_params(config))
    with reference(tmp_path / "ours") as (_, model):
        model.save_pretrained(tmp_path / "theirs", max_shard_size="8KB" if sharded else "5GB")
    assert (tmp_path / "theirs/model.safetensors.index.json").exists() == sharded
    loaded, decoder, params = hf.load(tmp_path / "theirs")
    tokens, mask = inputs()
    expected = reference_logits(tmp_path / "theirs", tokens, mask)
    got = np.asarray(apply(decoder, params, jnp.asarray(tokens), jnp.asarray(mask)))
    assert loaded == config
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(got[mask], expected[mask], atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["opt", "qwen3"])
def test_checkpoint_of_transformers_round_trips(family, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = CONFIGS["opt" if family == "opt" else "qwen3-tied"]
    fields = family_of(config).to_fields(config)
    config = transformers.AutoConfig.for_model(**{**fields, "eos_token_id": 7})
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "theirs")
    config, _, params = hf.load(tmp_path / "theirs")
    hf.save(tmp_path / "ours", config, params, source=tmp_path / "theirs")
    tokens, mask = inputs()
    expected, got = (reference_logits(tmp_path / name, tokens, mask) for name in ("theirs", "ours"))
    np.testing.assert_array_equal(got, expected)
    assert json.loads((tmp_path / "ours/config.json").read_text())["eos_token_id"] == 7
    assert (tmp_path / "ours/generation_config.json").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", [OPT, QWEN3], ids=["opt", "qwen3"])
def test_bfloat16_is_near_float32(config, tmp_path):
    params = random_params(config, jnp.bfloat16)
    hf.save(tmp_path, config, params)
    _, _, loaded = hf.load(tmp_path, jnp.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    tokens, mask = inputs()
    low = logits_of(config, params, tokens, mask)
    high = logits_of(config, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), tokens, mask)
    assert low.dtype == np.float32
    assert np.abs(low - high)[mask].mean() < 0.05 * np.abs(high).mean()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_saved_bfloat16_is_read_by_transformers(tmp_path):
    params = random_params(QWEN3, jnp.bfloat16)
    hf.save(tmp_path, QWEN3, params)
    tokens, mask = inputs()
    expected = reference_logits(tmp_path, tokens, mask)
    got = logits_of(QWEN3, hf.load(tmp_path, jnp.float32)[2], tokens, mask)
    np.testing.assert_allclose(got[mask], expected[mask], atol=1e-4)


@pytest.mark.parametrize("config", by_default(CONFIGS, "qwen3-bias", "opt"))
def test_padding_changes_no_real_token(config):
    config = CONFIGS[config]
    params = random_params(config)
    tokens, mask = inputs()
    padded = logits_of(config, params, tokens, mask)[1, :7]
    alone = logits_of(config, params, tokens[1:, :7], mask[1:, :7])[0]
    np.testing.assert_allclose(padded, alone, atol=1e-5)
    left = np.roll(tokens[1:], 4, axis=1), np.roll(mask[1:], 4, axis=1)
    np.testing.assert_allclose(logits_of(config, params, *left)[0, 4:], alone, atol=1e-5)


def test_later_tokens_do_not_change_earlier_ones():
    params = random_params(QWEN3)
    tokens, mask = inputs()
    changed = tokens.copy()
    changed[:, 6:] = 1
    first, second = (logits_of(QWEN3, params, own, mask) for own in (tokens, changed))
    np.testing.assert_array_equal(first[:, :6], second[:, :6])
    assert np.abs(first[0, 6:] - second[0, 6:]).max() > 0.01


def strategy_of(config):
    decoder = hf.make_decoder(config)

    def fitness(params, batch, key):
        return jnp.mean(jax.nn.log_softmax(apply(decoder, params, *batch))[:, :, 0])

    return eggroll.EvolutionStrategy(fitness, population_size=4, sigma=0.01, optimizer=optax.sgd(0.1))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("config", [*CONFIGS.values(), RWKV7], ids=[*CONFIGS, "rwkv7"])
def test_every_matrix_gets_low_rank_noise(config, dtype):
    strategy = strategy_of(config)
    state = strategy.init(random_params(config, dtype), key=jax.random.key(0))
    for leaf in strategy.plan(state, tuple(map(jnp.asarray, inputs()))).leaves:
        part, name = leaf.path.split("/")
        stacked = part == "blocks"
        matrix = len(leaf.shape) == 2 + stacked
        assert leaf.role == ("low-rank" if matrix else "dense"), leaf
        assert not matrix or leaf.stack == ((0,) if stacked else ()), leaf
        assert ("used twice" in leaf.reason) == (name == "embed" and config.tie_word_embeddings), leaf


@pytest.mark.parametrize("config", [slow(OPT), CONFIGS["qwen3-tied"]], ids=["opt", "qwen3-tied"])
def test_lazy_members_equal_built_ones(config):
    strategy, batch = strategy_of(config), tuple(map(jnp.asarray, inputs()))
    state = strategy.init(random_params(config), key=jax.random.key(0))
    population = strategy.ask(state)
    got = population.apply(lambda params, batch: apply(hf.make_decoder(config), params, *batch), batch)
    for member in range(2):
        built = population.member(member)
        np.testing.assert_allclose(got[member], logits_of(config, built, *batch), atol=1e-4)
    assert np.abs(got[0] - got[1]).max() > 0.01


def test_tied_model_has_no_head():
    assert "head" not in random_params(OPT)["resident"]
    assert "head" in random_params(QWEN3)["resident"]


@pytest.fixture
def folder(tmp_path):
    return save_without_sums(tmp_path, QWEN3)


def edit(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rewrite(folder, change):
    """Write the tensors anew, after `change(tensors)`."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def shard(folder, listed):
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))


def test_files_of_a_model_without_head_are_read(folder):
    edit(folder, tie_word_embeddings=True)
    rewrite(folder, lambda tensors: tensors.pop("lm_head.weight"))
    expected = hf.load(folder)[2]
    rewrite(
        folder, lambda tensors: [tensors.update({name[6:]: tensors.pop(name)}) for name in list(tensors) if "model." in name]
    )
    jax.tree.map(np.testing.assert_array_equal, hf.load(folder)[2], expected)


def test_absent_fields_have_the_defaults_of_transformers(folder):
    edit(folder, head_dim=None, num_key_value_heads=None)
    config = hf.read_config(folder)
    assert (config.head_dim, config.num_key_value_heads) == (128, 4)


def test_older_rotary_fields_are_read(folder):
    edit(folder, rope_parameters=None, rope_theta=7.0, rope_scaling=None)
    assert hf.read_config(folder).rotary == Rotary(7.0)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"model_type": "bloom"}, "must be one of opt, llama, qwen2, qwen3, rwkv7, got 'bloom'"),
        ({"model_type": None}, "must be one of opt, llama, qwen2, qwen3, rwkv7, got None"),
        ({"use_sliding_window": True}, "'use_sliding_window' is True in config.json, but 'qwen3' supports only False"),
        ({"layer_types": ["sliding_attention"]}, "supports only full attention"),
        ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor' is 0.5 in config.json, but 'qwen3' supports only 1.0"),
        ({"rope_scaling": {"type": "linear"}}, "'factor' of 'linear' rotary positions must be a number > 0, got None"),
        ({"rope_parameters": {"full_attention": {}}}, "rotary positions in config.json must be one object for all layers"),
        ({"model_type": "qwen3_moe"}, "model_type in .* must be one of opt, llama, qwen2, qwen3, rwkv7, got 'qwen3_moe'"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "must be of type default, linear, llama3, yarn, got 'dynamic'"),
        ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu' in config.json, but 'qwen3' supports only 'silu'"),
        ({"hidden_size": None}, "config.json of model_type 'qwen3' has no 'hidden_size'"),
        ({"hidden_size": "16"}, "'hidden_size' in config.json must be an integer >= 1, got '16'"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"head_dim": 0}, "'head_dim' in config.json must be an integer >= 1, got 0"),
        ({"head_dim": 5}, "head_dim must be even, got 5"),
        ({"vocab_size": 51}, r"tensor 'model.embed_tokens.weight' has shape \[50, 16\], but config.json expects \[51, 16\]"),
        ({"num_hidden_layers": 4}, "has no tensor 'model.layers.3.input_layernorm.weight', expected with shape"),
    ],
)
def test_config_that_does_not_fit_is_refused_by_a_clear_error(folder, fields, sentence):
    edit(folder, **fields)
    with pytest.raises(ValueError, match=sentence):
        hf.load(folder)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"activation_function": "gelu"}, "supports only 'relu'"),
        ({"enable_bias": False}, "'enable_bias' is False in config.json, but 'opt' supports only True"),
        ({"num_attention_heads": 3}, "hidden_size 16 is not a multiple of num_attention_heads 3"),
    ],
)
def test_opt_variant_is_refused(tmp_path, fields, sentence):
    save_without_sums(tmp_path, OPT)
    edit(tmp_path, **fields)
    with pytest.raises(ValueError, match=sentence):
        hf.load(tmp_path)


def test_missing_and_wrong_tensors_are_named(folder):
    rewrite(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"has no tensor 'model.layers.1.mlp.up_proj.weight', expected with shape \[24, 16\]"):
        hf.load(folder)
    rewrite(folder, lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.weight": np.zeros((24, 15), np.float32)}))
    with pytest.raises(ValueError, match=r"shape \[24, 15\], but config.json expects \[24, 16\]"):
        hf.load(folder)


def test_tensors_that_would_change_the_model_are_refused(folder):
    expected = hf.load(folder)[2]
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(3, np.float32)}))
    jax.tree.map(np.testing.assert_array_equal, hf.load(folder)[2], expected)
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(24, np.float32)}))
    with pytest.raises(ValueError, match=r"tensor 'model.layers.0.self_attn.q_proj.bias' does not belong to the 'qwen3' that"):
        hf.load(folder)


def test_head_of_a_tied_model_must_be_the_embedding(folder):
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    edit(folder, tie_word_embeddings=True)
    assert "head" not in hf.load(folder)[2]["resident"]
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": 2 * tensors["model.embed_tokens.weight"]}))
    with pytest.raises(
        ValueError, match=r"'lm_head.weight' differs from 'model.embed_tokens.weight', but config.json ties them"
    ):
        hf.load(folder)


def test_missing_files_are_named(folder):
    shard(folder, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    with pytest.raises(FileNotFoundError, match=r"index.json lists model-2.safetensors, which does not exist"):
        hf.load(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="has no 'weight_map'"):
        hf.load(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no weights: expected model.safetensors, or"):
        hf.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        hf.load(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, -2])
def test_damaged_weights_are_refused_by_a_clear_error(folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model.safetensors is not a complete safetensors file"):
        hf.load(folder)


@pytest.mark.parametrize(
    ("text", "sentence"), [(b'{"model', "not valid JSON"), (b"\xff\xfe", "not valid JSON"), (b"[]", "got a list")]
)
def test_damaged_config_is_refused_by_a_clear_error(folder, text, sentence):
    (folder / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=sentence):
        hf.load(folder)


def test_saving_and_calling_check_what_they_get(folder):
    params = random_params(QWEN3)
    params["resident"]["head"] = params["resident"]["head"][:-1]
    with pytest.raises(ValueError, match=r"'resident/head' has shape \(49, 16\), expected \(50, 16\)"):
        hf.save(folder, QWEN3, params)
    del params["resident"]["head"]
    with pytest.raises(ValueError, match="'resident/head' has shape none: it is missing, expected"):
        hf.save(folder, QWEN3, params)
    with pytest.raises(ValueError, match="dtype must be a floating one such as float32 or bfloat16, got int32"):
        hf.load(folder, jnp.int32)
    with pytest.raises(ValueError, match="21 tokens do not fit the 20 positions"):
        logits_of(OPT, random_params(OPT), np.zeros((1, 21), np.int32), np.ones((1, 21), bool))
