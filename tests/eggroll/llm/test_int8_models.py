"""Int8 matrices of language models: the models of their float values, read and written, perturbed lazily token for token."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll
from eggroll.llm import hf
from eggroll.llm.decoding import complete, pad_prompts
from eggroll.llm.int8 import dequantise, matmul, optimizer_labels, quantise
from eggroll.llm.memory import memory_plan
from eggroll.llm.models.families import family_of
from eggroll.llm.shards import CONFIG
from tests.eggroll.llm.language_models import DECODING, RWKV7, TRANSFORMERS, greedy, inputs, logits_of, random_params
from tests.tables import by_default, slow

pytest.importorskip("safetensors")
MODELS = DECODING | {"llama-bias": TRANSFORMERS["llama-bias"]}
all_models = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)


def quantised(config):
    return quantise(family_of(config).leaves(config), random_params(config))


def test_quantisation_by_hand():
    table = family_of(RWKV7).leaves(RWKV7)
    params = random_params(RWKV7)
    matrix = jnp.zeros_like(params["blocks"]["r"]).at[:, 0, 0].set(-127.0).at[:, 1, 0].set(1.5).at[:, 2, 1].set(0.254)
    found = quantise(table, params | {"blocks": params["blocks"] | {"r": matrix}})["blocks"]["r"]
    assert found["int8"][0, :3, :3].tolist() == [[-127, 0, 0], [2, 0, 0], [0, 127, 0]]  # a half goes to the even integer
    np.testing.assert_allclose(found["scale"][0, :3], [1.0, 0.002, 0.0], rtol=1e-6)
    x = jnp.ones((1, 16)).at[0, 1].set(2.0)
    np.testing.assert_allclose(matmul(x, {k: v[0] for k, v in found.items()})[0, :3], [-123.0, 0.254, 0.0], rtol=1e-6)


@all_models
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_matrices_of_the_blocks_are_half_a_step_away(config, dtype):
    params = random_params(config, dtype)
    found = quantise(family_of(config).leaves(config), params)
    assert found["resident"] is params["resident"]
    changed = {name for name, leaf in found["blocks"].items() if isinstance(leaf, dict)}
    assert changed == {name for name, leaf in family_of(config).leaves(config).blocks.items() if len(leaf.shape) == 2}
    for name in changed:
        own, wide = found["blocks"][name], np.asarray(params["blocks"][name], np.float32)
        assert own["int8"].dtype == jnp.int8 and own["scale"].dtype == dtype
        step = np.asarray(own["scale"], np.float32)[:, None]
        error = np.abs(np.asarray(own["int8"], np.float32) * step - wide)
        assert (error <= (0.5001 if dtype == jnp.float32 else 1.0) * step).all()  # 127 rounded scales are up to 127 / 256 off
    labels = optimizer_labels(found)["blocks"]
    assert all(labels[name] == {"int8": "int8", "scale": "float"} for name in changed)


@pytest.mark.parametrize("name", by_default(MODELS, "rwkv7"))
def test_logits_and_tokens_are_those_of_the_float_values(name):
    config = MODELS[name]
    params = quantised(config)
    floats = dequantise(params)
    assert jax.tree.structure(floats) == jax.tree.structure(random_params(config))
    tokens, mask = inputs(left=True)
    ours, theirs = (logits_of(config, p, tokens, mask)[mask] for p in (params, floats))
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert np.abs(ours - logits_of(config, random_params(config), tokens, mask)[mask]).max() > 1e-3  # it is quantised
    continued = [greedy(config, p, tokens, mask, length=12)[0] for p in (params, floats)]
    np.testing.assert_array_equal(*continued)


@pytest.mark.parametrize("config", [MODELS["qwen3"], RWKV7], ids=["qwen3", "rwkv7"])
def test_an_export_has_the_float_values(config, tmp_path):
    params = quantised(config)
    hf.save(tmp_path, config, params)
    loaded, _, floats = hf.load(tmp_path)
    assert loaded == config and json.loads((tmp_path / CONFIG).read_text())["dtype"] == "float32"
    expected = jax.tree.leaves(dequantise(params))
    skipped = {"v0", "v1", "v2"} if config is RWKV7 else set()  # of the first layer, which does not use them
    for (path, got), wanted in zip(jax.tree.leaves_with_path(floats), expected, strict=True):
        first = 1 if path[-1].key in skipped else 0
        np.testing.assert_array_equal(got[first:], wanted[first:])


@pytest.mark.parametrize(("name", "rank"), [slow("qwen3", 1), slow("qwen3", 4), slow("rwkv7", 1)])
def test_members_continue_texts_as_built_ones_do(name, rank):
    config = MODELS[name]
    prompts = pad_prompts([[3, 4, 5], [6, 7, 8, 9, 10]], length=5)

    def continued(params, prompts):
        return complete(hf.make_generator(config), params, prompts, max_new_tokens=6, stop_token_ids=())

    rules = [(".*/scale", eggroll.Frozen()), (".*/int8", eggroll.LowRank(rank, sigma_multiplier=40.0))]
    rules.append((".*", eggroll.LowRank(rank)))
    es = eggroll.EvolutionStrategy(None, population_size=6, sigma=0.1, optimizer=optax.sgd(1.0), perturbation=rules)
    state = es.init(quantised(config), key=jax.random.key(0))
    population = es.ask(state)
    outputs = population.apply(continued, prompts)
    plan = es.plan(state)
    assert {leaf.role for leaf in plan.leaves if leaf.path.endswith("int8")} == {"low-rank"}
    assert {leaf.role for leaf in plan.leaves if leaf.path.endswith("scale")} <= {"frozen", "dense"}
    oracle = jax.jit(continued)
    for index in range(6):
        expected = oracle(population.member(index), prompts)
        np.testing.assert_array_equal(outputs.tokens[index], expected.tokens)
    assert len(np.unique(outputs.tokens, axis=0)) > 1


def test_a_plan_of_memory_counts_a_byte_for_a_weight():
    sizes = dict(dtype="float32", prompts=2, prompt_length=5, max_new_tokens=4, rank=1, budget=1 << 30)
    config = TRANSFORMERS["llama"]
    whole, short = memory_plan(config, **sizes), memory_plan(config, weights="int8", **sizes)
    matrices, outputs = 3 * (4 * 16 * 16 + 3 * 16 * 24), 3 * (5 * 16 + 2 * 24)
    assert whole.parameters - short.parameters == 3 * matrices - 4 * outputs
    assert short.model == "llama, float32, int8 matrices" and short.cache == whole.cache and short.noise == whole.noise
    sides = 3 * (4 * 32 + 3 * 40)
    assert whole.factors - short.factors == 3 * sides
