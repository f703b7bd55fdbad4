"""The memory plan: numbers by hand, arrays that exist, the compiler's account, and nothing made for a large model."""

import json
import resource

import jax
import jax.numpy as jnp
import optax
import pytest

import eggroll
from eggroll.llm import hf
from eggroll.llm.decoding import complete, pad_prompts
from eggroll.llm.memory import memory_plan
from tests.eggroll.llm.language_models import LLAMA, OPT, RWKV7, random_params

SIZES = dict(prompts=2, prompt_length=5, max_new_tokens=4, rank=1, budget=1 << 30)
LLAMA_7B = {  # config.json of Llama-2-7B
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def planned(config=LLAMA, dtype="float32", **sizes):
    return memory_plan(config, dtype=dtype, **(SIZES | sizes))


def test_numbers_by_hand():
    """V 50, width 16, feed-forward 24, L 3 layers, 4 heads of 4, all of them with keys; 2 texts of S = 9 tokens."""
    plan = planned()
    matrices, vectors = 2 * 50 * 16 + 3 * (4 * 16 * 16 + 3 * 16 * 24), 16 + 3 * 2 * 16
    assert plan.parameters == 4 * (matrices + vectors)
    assert plan.cache == 2 * 3 * 2 * 4 * 9 * 4 * 4 + 2 * 9 + 2 * 4 + 4  # 2 L B K S d floats, seen, positions, filled
    sides = 2 * [50 + 16] + 3 * (4 * [16 + 16] + 3 * [16 + 24])  # r (m + n) of every matrix, r = 1
    assert plan.factors == 4 * sum(sides)
    assert plan.noise == 4 * sum(-(-side // 32) for side in sides) + 4 * vectors  # 32 signs a word; vectors are dense
    assert plan.logits == 2 * 50 * 4
    assert plan.per_member == plan.cache + plan.noise + plan.factors + plan.logits
    assert planned(dtype=jnp.bfloat16).parameters == plan.parameters // 2
    assert planned(rank=3).factors == 3 * plan.factors


def test_state_is_what_the_optimizer_and_masters_hold():
    parameters = planned().parameters
    assert planned().state == 0 and planned(optimizer=optax.sgd(0.1)).state == 0
    adam = planned(optimizer=optax.adam(0.1))
    assert adam.state == 2 * parameters + 4 and adam.of_a_pair == adam.parameters + adam.state + 2 * adam.per_member
    assert planned(dtype="bfloat16", optimizer=optax.sgd(0.1)).state == parameters  # float32 masters
    assert planned(dtype="bfloat16", optimizer=optax.sgd(0.1), precision="stochastic").state == 0


def test_members_fill_the_budget_in_pairs():
    plan = planned()
    for members, expected in [(-1, 0), (1, 0), (2, 2), (7, 6)]:
        budget = plan.parameters + members * plan.per_member
        assert planned(budget=budget).members == expected and planned(budget=budget - 1).members <= expected


def test_the_cache_is_that_of_a_real_prompt():
    prompts = pad_prompts([[1, 2, 3], [4, 5, 6, 7, 8]], length=5)
    for config in (LLAMA, RWKV7):
        prefill = jax.jit(hf.make_generator(config).prefill, static_argnums=3)
        cache = prefill(random_params(config), *map(jnp.asarray, prompts), 4)[1]
        assert planned(config).cache == sum(leaf.nbytes for leaf in jax.tree.leaves(cache))


def test_states_do_not_grow_with_the_room():
    assert planned(RWKV7).cache == planned(RWKV7, max_new_tokens=4000).cache > 0
    assert planned(max_new_tokens=4000).cache > 400 * planned().cache  # control: keys and values do


@pytest.mark.slow
def test_the_compiler_sets_aside_little_more_for_a_long_cache():
    """Temporary bytes of a member, between two and four members at a time: the cache, and one layer of it on the way."""
    generator, length = hf.make_generator(LLAMA), 2000
    prompts = jax.tree.map(jnp.asarray, pad_prompts([[1, 2, 3], [4, 5, 6, 7, 8]], length=5))

    def function(params, prompts):
        return complete(generator, params, prompts, max_new_tokens=length, stop_token_ids=())

    def temporary_bytes(members):
        es = eggroll.EvolutionStrategy(None, population_size=members, sigma=0.1, optimizer=optax.sgd(1.0))
        state = es.init(random_params(LLAMA), key=jax.random.key(0))
        es.plan(state, prompts, function=function)
        one = lambda params, prompts, key, _: function(params, prompts)  # noqa: E731
        evaluate = jax.jit(lambda state: es.evaluate(state, prompts, function=one))
        return evaluate.lower(state).compile().memory_analysis().temp_size_in_bytes

    slope = (temporary_bytes(4) - temporary_bytes(2)) / 2
    expected = planned(max_new_tokens=length).per_member
    assert expected < slope < 1.6 * expected


def test_a_large_model_is_planned_in_seconds_without_its_arrays(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    arrays, peak = len(jax.live_arrays()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sizes = dict(prompts=8, prompt_length=128, max_new_tokens=384, rank=1, budget=80 << 30)
    plan = planned(hf.read_config(tmp_path), jnp.bfloat16, **sizes)
    assert len(jax.live_arrays()) <= arrays + 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200 * 1024  # KiB; the model has 13 GiB
    assert plan.parameters == 2 * 6_738_415_616  # the number of parameters that the model is published with
    assert plan.cache // (2 * 32 * 4096 * 2) == 8 * 512  # L layers of width 4096, 8 texts of 512 tokens
    assert plan.members == 32
    table = plan.table()
    assert "members at a time" in table and "12.55 GiB" in table and "8 texts of 128 + 384 tokens" in table


def test_a_budget_without_room_says_what_is_missing():
    pair = planned().parameters + 2 * planned().per_member
    plan = planned(budget=pair - 100)
    assert (plan.members, plan.shortage) == (0, 100)
    assert plan.table().splitlines()[-1].endswith("KiB, short by 100 B")
    assert (planned(budget=pair).members, planned(budget=pair).shortage) == (2, 0)
    assert "a pair needs" not in planned().table()


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"prompts": 0}, "prompts must be an integer >= 1, got 0"),
        ({"prompt_length": 0}, "prompt_length must be an integer >= 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer >= 1, got 0"),
        ({"rank": 0}, "rank must be an integer >= 1, got 0"),
        ({"budget": 0}, "budget must be an integer >= 1, got 0"),
        ({"dtype": "int8"}, "dtype must be a floating one such as float32 or bfloat16, got int8"),
        ({"config": OPT}, "must be one of llama, qwen2, qwen3, rwkv7 to continue texts, got 'opt'"),
    ],
)
def test_wrong_use_is_refused_by_a_clear_error(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        planned(**wrong)
