"""Models that continue texts: tokens of transformers, logits of whole texts, no trace of left padding, low-rank noise."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll
from eggroll.llm import hf
from eggroll.llm.models.families import family_of
from tests.eggroll.llm.language_models import (
    DECODING,
    LLAMA,
    OPT,
    QWEN2,
    QWEN3,
    TRANSFORMERS,
    greedy,
    inputs,
    logits_of,
    moved,
    random_params,
    reference,
    reference_logits,
    save_without_sums,
)
from tests.tables import slow

pytest.importorskip("safetensors")
LONG, NEW = 40, 64  # longer than what the scaled rotary positions call a trained text
all_decoding = pytest.mark.parametrize("config", DECODING.values(), ids=DECODING)
each_kind = pytest.mark.parametrize(  # of model; the others differ in their rotary positions
    "config",
    [
        pytest.param(own, id=name, marks=[] if name in ("qwen3", "rwkv7") else pytest.mark.slow)
        for name, own in DECODING.items()
    ],
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", TRANSFORMERS.values(), ids=TRANSFORMERS)
def test_checkpoint_of_transformers_is_read_continued_and_written(config, tmp_path):
    """Logits, 64 greedy tokens of a left-padded batch, and the logits of transformers from what we write."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    own = transformers.AutoConfig.for_model(**family_of(config).to_fields(config))
    moved(torch, transformers.AutoModelForCausalLM.from_config(own)).save_pretrained(tmp_path / "theirs")
    loaded, _, params = hf.load(tmp_path / "theirs")
    assert loaded == config
    tokens, mask = inputs(LONG, left=True)
    with reference(tmp_path / "theirs") as (_, model):
        expected = model(torch.tensor(tokens), attention_mask=torch.tensor(mask.astype(np.int64))).logits.numpy()
        options = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None)
        chosen = model.generate(torch.tensor(tokens), attention_mask=torch.tensor(mask.astype(np.int64)), **options)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits_of(config, params, tokens, mask)[mask], expected[mask], atol=1e-4)
    ours, _ = greedy(config, params, tokens, mask, length=NEW)
    np.testing.assert_array_equal(ours, chosen.numpy()[:, LONG:])
    assert len(np.unique(ours)) > 1
    hf.save(tmp_path / "ours", loaded, params)
    np.testing.assert_array_equal(reference_logits(tmp_path / "ours", tokens, mask), expected)


@each_kind
def test_steps_give_the_logits_of_whole_texts(config):
    """A prompt of nine tokens and six steps, against the text as a whole and against the prompt of fifteen."""
    params, generator = random_params(config), hf.make_generator(config)
    tokens, mask = map(jnp.asarray, inputs(15, left=True))
    whole = logits_of(config, params, tokens, mask)
    prefill, step = jax.jit(generator.prefill, static_argnums=3), jax.jit(generator.step)
    logits, cache = prefill(params, tokens[:, :9], mask[:, :9], 6)
    for position in range(9, 15):
        np.testing.assert_allclose(logits, whole[:, position - 1], atol=1e-5)
        logits, cache = step(params, cache, tokens[:, position])
    np.testing.assert_allclose(logits, whole[:, -1], atol=1e-5)
    assert logits.dtype == jnp.float32
    at_once, longer = prefill(params, tokens, mask, 0)
    np.testing.assert_allclose(at_once, logits, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), cache, longer
    ) if config.model_type == "rwkv7" else None


@each_kind
def test_left_padding_leaves_no_trace(config):
    """A padded text, whatever its padding holds, has the logits and tokens it has alone."""
    params = random_params(config)
    tokens, mask = map(jnp.asarray, inputs(11, left=True))
    chosen, logits = greedy(config, params, tokens, mask, length=6)
    alone, own = greedy(config, params, tokens[1:, 4:], mask[1:, 4:], length=6)
    np.testing.assert_array_equal(chosen[1:], alone)
    np.testing.assert_allclose(logits[:, 1:], own, atol=1e-5)
    other = jnp.where(mask, tokens, tokens[::-1] // 2)
    np.testing.assert_array_equal(greedy(config, params, other, mask, length=6)[1], logits)


@each_kind
def test_bfloat16_stays_near_float32(config):
    low = random_params(config, jnp.bfloat16)
    high = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), low)
    tokens, mask = map(jnp.asarray, inputs(left=True))
    rounded, exact = (greedy(config, params, tokens, mask, length=1)[1] for params in (low, high))
    assert rounded.dtype == jnp.float32
    assert np.abs(rounded - exact).mean() < 0.06 * np.abs(exact).mean()


def strategy_of(config):
    def fitness(params, batch, key):
        return jnp.mean(greedy(config, params, *batch, length=4)[1][..., 0])

    return eggroll.EvolutionStrategy(fitness, population_size=4, sigma=0.05, optimizer=optax.sgd(0.1))


@all_decoding
def test_every_matrix_gets_low_rank_noise_while_it_decodes(config):
    """In the prompt, and in the steps inside a loop over tokens."""
    strategy, batch = strategy_of(config), tuple(map(jnp.asarray, inputs(left=True)))
    state = strategy.init(random_params(config), key=jax.random.key(0))
    for leaf in strategy.plan(state, batch).leaves:
        stacked = leaf.path.startswith("blocks/")
        matrix = len(leaf.shape) == 2 + stacked
        assert leaf.role == ("low-rank" if matrix else "dense"), leaf
        assert not matrix or leaf.stack == ((0,) if stacked else ()), leaf


@pytest.mark.parametrize("config", [slow(DECODING["qwen3"]), DECODING["rwkv7"]], ids=["qwen3", "rwkv7"])
@pytest.mark.slow
def test_lazy_members_decode_what_built_ones_decode(config):
    strategy, batch = strategy_of(config), tuple(map(jnp.asarray, inputs(left=True)))
    population = strategy.ask(strategy.init(random_params(config), key=jax.random.key(0)))
    chosen, logits = population.apply(lambda params, batch: greedy(config, params, *batch, length=8), batch)
    built = greedy(config, population.member(1), *batch, length=8)
    np.testing.assert_array_equal(chosen[1], built[0])
    np.testing.assert_allclose(logits[1], built[1], atol=1e-4)
    assert np.abs(logits[0] - logits[1]).max() > 0.01


@pytest.mark.parametrize("members", [None, 2], ids=["one", "members"])
def test_a_step_writes_the_cache_in_place(members):
    """A loop of steps on a donated cache needs less memory than a second cache."""
    config = dataclasses.replace(QWEN2, num_hidden_layers=8)
    params, generator = random_params(config), hf.make_generator(config)
    prompt = jnp.ones((2, 4), jnp.int32), jnp.ones((2, 4), bool)

    def continued(params, cache):
        def body(state):
            count, token, cache = state
            logits, cache = generator.step(params, cache, token)
            return count + 1, jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

        return jax.lax.while_loop(lambda state: state[0] < 100, body, (0, prompt[0][:, 0], cache))[2]

    _, cache = jax.eval_shape(lambda params: generator.prefill(params, *prompt, 4000), params)
    if members:
        add = lambda leaf: jax.ShapeDtypeStruct((members, *leaf.shape), leaf.dtype)  # noqa: E731
        params = jax.tree.map(add, params)
        cache = cache._replace(k=add(cache.k), v=add(cache.v))
        axes = type(cache)(0, 0, None, None, None)
        continued = jax.vmap(continued, in_axes=(0, axes), out_axes=axes)
    compiled = jax.jit(continued, donate_argnums=1).lower(params, cache).compile()
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in (cache.k, cache.v))
    assert compiled.memory_analysis().temp_size_in_bytes < 0.6 * whole


def test_a_model_that_only_reads_is_refused():
    with pytest.raises(ValueError, match="must be one of llama, qwen2, qwen3, rwkv7 to continue texts, got 'opt'"):
        hf.make_generator(OPT)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"model_type": "bloom"}, "model_type must be one of llama, qwen2, qwen3, got 'bloom'"),
        ({"model_type": "qwen2", "attention_bias": True}, "attention_bias must be False of model_type 'qwen2', got True"),
        ({"mlp_bias": True}, "mlp_bias must be False of model_type 'qwen3', got True"),
    ],
)
def test_configurations_that_no_model_has_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(QWEN3, **options)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            {"rope_type": "llama3", "factor": 8.0},
            "'low_freq_factor' of 'llama3' rotary positions must be a number > 0, got None",
        ),
        ({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}, "low_freq_factor must be below"),
        ({"rope_type": "yarn", "factor": "4"}, "'factor' of 'yarn' rotary positions must be a number > 0, got '4'"),
        ({"rope_type": "longrope"}, "must be of type default, linear, llama3, yarn, got 'longrope'"),
    ],
)
def test_rotary_positions_that_do_not_fit_are_refused_by_a_clear_error(given, sentence, tmp_path):
    path = save_without_sums(tmp_path, LLAMA) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_parameters": given}))
    with pytest.raises(ValueError, match=sentence):
        hf.load(tmp_path)


def test_llama_without_a_head_size_divides_its_width(tmp_path):
    path = save_without_sums(tmp_path, LLAMA) / "config.json"
    fields = json.loads(path.read_text()) | {"head_dim": None}
    path.write_text(json.dumps(fields))
    assert hf.read_config(tmp_path) == LLAMA
    path.write_text(json.dumps(fields | {"num_attention_heads": 3}))
    with pytest.raises(ValueError, match=r"hidden_size 16 in config.json is not a multiple of num_attention_heads 3"):
        hf.read_config(tmp_path)
