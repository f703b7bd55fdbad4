"""RWKV-7: equal to the package `rwkv`, whole and with its state carried; both layouts of its files; what is refused."""

import dataclasses
import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eggroll.llm import hf
from eggroll.llm.decoder import apply
from eggroll.llm.models.rwkv7 import RWKV7Config
from tests.eggroll.llm.language_models import RWKV7, greedy, inputs, logits_of, random_params, save_without_sums

pytest.importorskip("safetensors")
ORIGINAL = RWKV7Config(50, 128, 96, 3, 12, 10, 9, 14, original_names=True)  # the package knows heads of 64


@pytest.fixture
def package(monkeypatch):
    """Makes the package's model of a file of ours."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("rwkv")
    monkeypatch.setenv("RWKV_V7_ON", "1")
    from safetensors.torch import load_file

    def opened(folder):
        torch.set_num_threads(1)
        torch.save(load_file(folder / "model.safetensors"), folder / "model.pth")
        return importlib.import_module("rwkv.model").RWKV(model=str(folder / "model"), strategy="cpu fp32")

    return opened


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_logits_and_greedy_tokens_are_those_of_the_package(package, tmp_path):
    hf.save(tmp_path, ORIGINAL, random_params(ORIGINAL))
    config, _, params = hf.load(tmp_path)
    assert config == ORIGINAL
    model, (tokens, mask) = package(tmp_path), inputs(12, left=True)
    whole = logits_of(config, params, tokens, mask)
    chosen, logits = greedy(config, params, tokens, mask, length=64)
    assert np.abs(whole).max() > 1
    for text in range(2):
        real = mask[text]
        expected, state = model.forward(tokens[text, real].tolist(), None, True)
        np.testing.assert_allclose(whole[text, real], expected.numpy(), atol=1e-4)
        out, picked = expected[-1], []
        for step in range(64):
            np.testing.assert_allclose(logits[step, text], out.numpy(), atol=1e-4)
            picked.append(int(out.argmax()))
            out, state = model.forward(picked[-1:], state)
        np.testing.assert_array_equal(chosen[text], picked)


@pytest.mark.slow
def test_gradient_is_the_same_with_padding():
    decoder, params, (tokens, _) = hf.make_decoder(RWKV7), random_params(RWKV7), inputs()
    padded = np.pad(tokens, ((0, 0), (3, 0)))

    @jax.jit
    def gradient(params, tokens, mask):
        return jax.grad(lambda params: jnp.sum(jnp.sin(apply(decoder, params, tokens, mask)[:, -11:])))(params)

    expected = gradient(params, tokens, np.ones(tokens.shape, bool))
    got = gradient(params, padded, np.arange(14) >= np.full((2, 1), 3))
    for name in ("k", "k_k", "w1", "v"):
        np.testing.assert_allclose(got["blocks"][name], expected["blocks"][name], atol=1e-4, rtol=1e-3)


def without_first_adapter(params):
    """The parameters as a file gives them: zeros where the first layer does nothing."""
    blocks = {name: leaf.at[0].set(0) if name in ("v0", "v1", "v2") else leaf for name, leaf in params["blocks"].items()}
    return params | {"blocks": blocks}


@pytest.mark.parametrize("original", [False, True], ids=["hugging-face", "original"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_both_layouts_round_trip(original, dtype, tmp_path):
    config = dataclasses.replace(RWKV7, original_names=original)
    params = random_params(config, dtype)
    hf.save(tmp_path, config, params)
    loaded, _, again = hf.load(tmp_path, dtype)
    assert loaded == config
    jax.tree.map(np.testing.assert_array_equal, again, without_first_adapter(params))


def test_tensors_have_the_names_and_shapes_of_their_layout(tmp_path):
    from safetensors.numpy import load_file

    shapes = {}
    for original in (False, True):
        config = dataclasses.replace(RWKV7, original_names=original)
        save_without_sums(tmp_path, config)
        shapes |= {name: value.shape for name, value in load_file(tmp_path / "model.safetensors").items()}
    expected = {
        "model.embeddings.weight": (50, 16),
        "model.layers.0.pre_norm.bias": (16,),
        "model.layers.2.attn.x_r": (1, 1, 16),
        "model.layers.2.attn.k_k": (16,),
        "model.layers.2.attn.r_k": (2, 8),
        "model.layers.2.attn.w_lora.lora.0.weight": (5, 16),
        "model.layers.2.attn.w_lora.lora.2.weight": (16, 5),
        "model.layers.2.attn.w_lora.lora.2.bias": (16,),
        "model.layers.1.attn.v_lora.lora.2.bias": (16,),
        "model.layers.2.attn.g_norm.weight": (16,),
        "model.layers.2.ffn.key.weight": (24, 16),
        "emb.weight": (50, 16),
        "blocks.0.ln0.weight": (16,),
        "blocks.2.att.k_k": (1, 1, 16),
        "blocks.2.att.w0": (1, 1, 16),
        "blocks.2.att.w1": (16, 5),
        "blocks.2.att.w2": (5, 16),
        "blocks.2.att.ln_x.weight": (16,),
        "blocks.2.ffn.value.weight": (16, 24),
    }
    assert {name: shapes.get(name) for name in expected} == expected
    absent = {"model.layers.0.attn.v_lora.lora.0.weight", "blocks.0.att.v1", "model.layers.0.attn.g_lora.lora.2.bias"}
    assert not absent & set(shapes)


def test_the_adapter_of_the_first_layer_has_no_effect():
    params = random_params(RWKV7)
    tokens, mask = inputs()
    first, second = (logits_of(RWKV7, own, tokens, mask) for own in (params, without_first_adapter(params)))
    np.testing.assert_allclose(first[mask], second[mask], atol=1e-6)


def test_right_padding_changes_no_real_token():
    params = random_params(RWKV7)
    tokens, mask = inputs()
    alone = logits_of(RWKV7, params, tokens[1:, :7], mask[1:, :7])[0]
    np.testing.assert_allclose(logits_of(RWKV7, params, tokens, mask)[1, :7], alone, atol=1e-5)


def test_the_state_does_not_grow():
    generator, params = hf.make_generator(RWKV7), random_params(RWKV7)

    def shapes(length):
        tokens, mask = jnp.zeros((2, length), jnp.int32), jnp.ones((2, length), bool)
        return jax.tree.map(
            jnp.shape, jax.eval_shape(lambda params: generator.prefill(params, tokens, mask, length)[1], params)
        )

    assert shapes(3) == shapes(300)


@pytest.fixture
def folder(tmp_path):
    return save_without_sums(tmp_path, RWKV7)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"attn": {"layers": [1]}}, r"'attn' is {'layers': \[1\]} in config.json, but 'rwkv7' supports only None"),
        ({"norm_first": False}, "'norm_first' is False in config.json, but 'rwkv7' supports only True"),
        ({"hidden_act": "relu"}, "'hidden_act' is 'relu' in config.json, but 'rwkv7' supports only 'sqrelu'"),
        ({"value_dim": [16, 32, 16]}, r"'value_dim' in config.json must be hidden_size 16 in every layer, got \[16, 32, 16\]"),
        ({"head_dim": 7}, "hidden_size 16 is not a multiple of head_dim 7"),
        ({"hidden_size": None}, "config.json of model_type 'rwkv7' has no 'hidden_size'"),
        ({"a_low_rank_dim": 5}, r"0.attn.a_lora.lora.0.weight' has shape \[6, 16\], but config.json expects \[5, 16\]"),
        ({"num_hidden_layers": 2}, r"tensor 'model.layers.2.attn.a_lora.lora.0.weight' does not belong to the 'rwkv7'"),
    ],
)
def test_files_that_do_not_fit_are_refused_by_a_clear_error(folder, fields, sentence):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ValueError, match=sentence):
        hf.load(folder)


def test_inner_sizes_that_are_left_out_grow_with_the_width(folder):
    """As in the 0.1B model: 768 wide, inner sizes 64, 64, 32 and 128."""
    path = folder / "config.json"
    ranks = ("decay_low_rank_dim", "a_low_rank_dim", "v_low_rank_dim", "gate_low_rank_dim")
    left_out = dict.fromkeys((*ranks, "intermediate_size", "head_dim"))
    path.write_text(json.dumps(json.loads(path.read_text()) | left_out | {"hidden_size": 768}))
    config = hf.read_config(folder)
    assert [getattr(config, name) for name in ranks] == [64, 64, 32, 128]
    assert (config.intermediate_size, config.head_dim) == (3072, 64)
