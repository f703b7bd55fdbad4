"""Tasks from JSONL: tokens, masks, truncation, batches, losses against loops, the shipped task, errors of one sentence."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eggroll.envs.tasks.records import read_records
from eggroll.experiments.zo.data import examples, sentiment
from eggroll.experiments.zo.data.tasks import RTE, SST2, Classification, Generation
from eggroll.experiments.zo.problem import FineTuning, answers, candidate_loss, texts
from eggroll.llm.decoder import Decoder, hidden_states, token_log_likelihood
from eggroll.llm.models import transformer
from eggroll.llm.models.families import init_params
from eggroll.llm.tokenizers import ByteTokenizer, FileTokenizer
from eggroll.zo.blocks import whole_loss

BYTES = ByteTokenizer()
SUMS = Generation("{prompt} =", " {answer}\n")


def jsonl(tmp_path, *lines):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def load(path, task, tokenizer, *, max_length):
    return examples.encode(read_records(path), task, tokenizer, max_length=max_length)


def text_of(tokens, marked):
    return BYTES.decode([int(token) for token in tokens[marked]])


def test_classification_examples(tmp_path):
    path = jsonl(tmp_path, {"text": "a fine film", "label": 1}, {"text": "no", "label": "0"})
    got = load(path, SST2, BYTES, max_length=64)
    assert got.tokens.shape == got.mask.shape == got.targets.shape == (2, 2, 1 + len("a fine film It was terrible"))
    assert got.labels.tolist() == [1, 0]
    assert [got.tokens.dtype, got.mask.dtype, got.targets.dtype, got.labels.dtype] == [np.int32, bool, bool, np.int32]
    assert [text_of(got.tokens[0, c], got.targets[0, c]) for c in range(2)] == [" terrible", " great"]
    assert text_of(got.tokens[1, 1], got.mask[1, 1]) == "no It was great"
    assert got.tokens[0, 0, 0] == 256 and not got.tokens[~got.mask].any()
    assert not (got.targets & ~got.mask).any()


def test_generation_examples(tmp_path):
    got = load(jsonl(tmp_path, {"prompt": "3 + 4", "answer": 7}), SUMS, BYTES, max_length=64)
    assert got.tokens.shape == (1, 1, len("3 + 4 = 7\n") + 1) and got.labels.tolist() == [0]
    assert text_of(got.tokens[0, 0], got.mask[0, 0]) == "3 + 4 = 7\n"
    assert text_of(got.tokens[0, 0], got.targets[0, 0]) == " 7\n"


def test_templates_with_several_fields(tmp_path):
    line = {"premise": "It rains.", "hypothesis": "It is {wet}.", "label": 0}
    got = load(jsonl(tmp_path, line), RTE, BYTES, max_length=200)
    expected = 'It rains.\nDoes this mean that "It is {wet}." is true? Yes or No?\nYes'
    assert text_of(got.tokens[0, 0], got.mask[0, 0]) == expected


def test_long_prompts_lose_their_beginning_alike_for_every_candidate(tmp_path):
    lines = {"text": "x" * 50 + "abc", "label": 0}, {"text": "abc", "label": 1}
    with pytest.warns(UserWarning, match="^1 of 2 prompts lose their beginning at max_length 20; 70 leaves"):
        got = load(jsonl(tmp_path, *lines), SST2, BYTES, max_length=20)
    assert got.tokens.shape[2] == 20
    assert [text_of(row, mask) for row, mask in zip(got.tokens[0], got.mask[0], strict=True)] == [
        "abc It was terrible",  # 9 of 20 tokens for " terrible", 1 for the start
        "abc It was great",
    ]
    assert (got.tokens[:, :, 0] == 256).all()


def test_batches_are_functions_of_seed_and_step(tmp_path):
    lines = [{"prompt": str(i), "answer": str(i)} for i in range(10)]
    everything = load(jsonl(tmp_path, *lines), Generation(), BYTES, max_length=8)

    def tokens(step, seed=0):
        return examples.batch_of(everything, step, size=3, seed=seed).tokens[:, 0, 1].tolist()

    assert tokens(4) == tokens(4) and tokens(4, seed=1) != tokens(4)
    epoch = [token for step in range(3) for token in tokens(step)]
    assert len(set(epoch)) == 9
    assert epoch != [token for step in range(3, 6) for token in tokens(step)]
    for size in (0, 11):
        with pytest.raises(ValueError, match=f"between 1 and the number of examples, 10, got {size}"):
            examples.batch_of(everything, 0, size=size)


PARAMS = {"resident": {}, "blocks": {"none": np.zeros((1, 1), np.float32)}}


def bigram_decoder(table):
    """Logits are the row of the last token."""
    return Decoder(
        lambda resident, tokens, mask: (tokens[..., None], ()),
        lambda weights, x, aux: x,
        lambda resident, x: table[x[..., 0]],
    )


@pytest.fixture
def case(tmp_path):
    lines = [{"text": "good", "label": 1}, {"text": "a longer text", "label": 0}, {"text": "so", "label": 1}]
    batch = load(jsonl(tmp_path, *lines), SST2, BYTES, max_length=40)
    table = jax.random.normal(jax.random.key(0), (257, 257))
    return batch, bigram_decoder(table), np.asarray(jax.nn.log_softmax(table))


def loop_score(log_probability, tokens, targets):
    return sum(log_probability[tokens[t - 1], tokens[t]] for t in range(len(tokens)) if targets[t])


def scores_of(decoder, batch):
    width = int(batch.targets.sum(axis=-1).max())
    x = hidden_states(decoder, PARAMS, *texts(batch, width=width))
    return answers(decoder, {}, x, batch, width=width).scores


def test_scores_and_losses_equal_loops(case):
    batch, decoder, log_probability = case
    expected = np.array(
        [
            [loop_score(log_probability, *candidate) for candidate in zip(*row, strict=True)]
            for row in zip(batch.tokens, batch.targets, strict=True)
        ]
    )
    got = scores_of(decoder, batch)
    assert got.shape == (3, 2) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    loss, weight = candidate_loss(got, batch)
    shares = np.exp(expected) / np.exp(expected).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(loss, -np.log(shares[range(3), batch.labels]), rtol=1e-4, atol=1e-5)
    assert weight.tolist() == [1, 1, 1]


@pytest.mark.slow
def test_mean_over_shards_is_the_mean_over_all(tmp_path, case):
    _, decoder, log_probability = case
    lines = [{"prompt": "1", "answer": "22"}, {"prompt": "3", "answer": "4444444"}, {"prompt": "5", "answer": "6"}]
    batch = load(jsonl(tmp_path, *lines), SUMS, BYTES, max_length=40)
    loss, weight = candidate_loss(scores_of(decoder, batch), batch)
    assert weight.tolist() == [4, 9, 3]
    total = sum(loop_score(log_probability, batch.tokens[n, 0], batch.targets[n, 0]) for n in range(3))
    np.testing.assert_allclose(loss.sum() / weight.sum(), -total / 16, rtol=1e-5)
    tuning = FineTuning(decoder, batch, batch, batch)
    shards = [examples.Examples(*(array[part] for array in batch)) for part in (slice(0, 1), slice(1, 3))]
    totals, weights = zip(*(whole_loss(tuning.pieces("loss"))(PARAMS, shard, None) for shard in shards), strict=True)
    np.testing.assert_allclose(sum(totals) / sum(weights), -total / 16, rtol=1e-5)


def test_first_position_and_nan_outside_targets_count_nothing():
    logits = jnp.full((1, 3, 4), jnp.nan).at[0, 1].set(0.0)
    got = token_log_likelihood(logits, jnp.zeros((1, 3), jnp.int32), jnp.array([[True, False, True]]))
    np.testing.assert_allclose(got, [[0.0, 0.0, -np.log(4)]], rtol=1e-6)


@pytest.mark.slow
def test_bfloat16_model_scores_in_float32(tmp_path):
    config = transformer.TransformerConfig(257, 16, 24, 2, 2, 1, head_dim=8, tie_word_embeddings=True)
    params = init_params(config, key=jax.random.key(0), dtype=jnp.bfloat16)
    files = sentiment.write(tmp_path, train=4, validation=1, test=1)
    batch = load(files["train"], sentiment.TASK, BYTES, max_length=66)
    decoder, width = transformer.make_decoder(config), 5

    @jax.jit
    def score(params, batch):
        x = hidden_states(decoder, params, *texts(batch, width=width))
        return answers(decoder, params["resident"], x, batch, width=width).scores

    got = score(params, batch)
    assert got.dtype == jnp.float32 and got.shape == (4, 2) and np.isfinite(got).all()


def test_shipped_task_is_deterministic_balanced_and_split(tmp_path):
    everything = dict(sentiment.sentences())
    assert len(everything) == len(sentiment.sentences()) and 2 * sum(everything.values()) == len(everything)
    files = sentiment.write(tmp_path / "a", seed=3)
    again, other = sentiment.write(tmp_path / "b", seed=3), sentiment.write(tmp_path / "c", seed=4)
    assert all(files[name].read_bytes() == again[name].read_bytes() != other[name].read_bytes() for name in files)
    splits = [[record.fields for record in read_records(path)] for path in files.values()]
    assert [len(split) for split in splits] == [1000, 200, 1000]
    texts = [fields["text"] for split in splits for fields in split]
    assert len(set(texts)) == len(texts)
    assert all(everything[fields["text"]] == fields["label"] for split in splits for fields in split)
    assert 0.4 < np.mean([fields["label"] for fields in splits[0]]) < 0.6
    assert everything["the film was not dull"] == 1 and everything["the film was very dull"] == 0
    with pytest.raises(ValueError, match="all together at most 110592, got"):
        sentiment.write(tmp_path, train=200_000)


@pytest.fixture
def tokenizer_file(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the film was great and terrible"] * 5, trainer)
    start = tokenizers.processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer.post_processor = start
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_tokenizer_file(tokenizer_file):
    tokenizer = FileTokenizer(tokenizer_file.parent)  # neither truncates nor pads, whatever the file says
    assert tokenizer.prefix == (0,) and 258 < tokenizer.vocab_size <= 290
    text = "the film was great, naïve and terrible"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(text)) < len(text) and tokenizer.encode("") == []
    assert tokenizer.encode(" great</s>")[-1] == 1
    record = read_records(jsonl(tokenizer_file.parent, {"text": "a film", "label": 1}))
    got = examples.encode(record, SST2, tokenizer, max_length=30)
    targets = got.tokens[0, 1][got.targets[0, 1]]
    assert got.tokens[0, 1, 0] == 0 and tokenizer.decode(targets.tolist()) == " great"


def test_damaged_tokenizer_files_are_refused_by_a_clear_error(tokenizer_file):
    tokenizer_file.write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json is not a tokenizer.json: "):
        FileTokenizer(tokenizer_file)
    tokenizer_file.unlink()
    with pytest.raises(FileNotFoundError, match="there is no tokenizer at"):
        FileTokenizer(tokenizer_file.parent / "tokenizer.json")


GOOD = {"text": "a", "label": 1}


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ([], "data.jsonl is empty: expected one JSON object a line"),
        (["", "  "], "data.jsonl is empty"),
        ([GOOD, '{"text": '], "data.jsonl, line 2: not valid JSON"),
        ([GOOD, "", "[1]"], "data.jsonl, line 3: expected a JSON object, got a list"),
        ([GOOD, {"label": 1}], "data.jsonl, line 2: field 'text' is missing; the line has label"),
        ([GOOD, {"text": "a"}], "data.jsonl, line 2: field 'label' is missing; the line has text"),
        ([{}], "data.jsonl, line 1: field 'label' is missing; the line has none"),
        ([{"text": ["a"], "label": 1}], "line 1: field 'text' must be text or a number, got a list"),
        ([{"text": None, "label": 1}], "line 1: field 'text' must be text or a number, got null"),
        ([GOOD, {"text": "a", "label": 2}], "data.jsonl, line 2: label '2' is unknown, expected one of 0, 1"),
    ],
)
def test_bad_files_are_refused_by_a_clear_error(tmp_path, lines, sentence):
    with pytest.raises(ValueError, match=sentence):
        load(jsonl(tmp_path, *lines), SST2, BYTES, max_length=64)


def test_file_that_is_not_text_is_refused_by_a_clear_error(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(ValueError, match="line 1: not valid JSON"):
        read_records(tmp_path / "data.jsonl")


def test_separators_of_unicode_do_not_end_a_line_nor_does_a_mark_of_byte_order_begin_one(tmp_path):
    path = jsonl(tmp_path, "\ufeff" + json.dumps({"text": "a\u2028b", "label": 1}, ensure_ascii=False), GOOD)
    assert [record.fields["text"] for record in read_records(path)] == ["a\u2028b", "a"]


def test_candidates_that_cannot_be_predicted_are_refused_by_a_clear_error(tmp_path):
    path = jsonl(tmp_path, GOOD, GOOD)
    with pytest.raises(ValueError, match="line 1: the tokenizer turns '', a text to be predicted, into no tokens"):
        load(path, Classification("{text}", {"0": "", "1": "x"}), BYTES, max_length=64)
    with pytest.raises(ValueError, match=r"line 1: two of the candidates \('x', 'x'\) have the same tokens"):
        load(path, Classification("{text}", {"0": "x", "1": "x"}), BYTES, max_length=64)
    with pytest.raises(
        ValueError, match="line 1: a text to be predicted has 9 tokens, which leaves no place for a prompt in 10"
    ):
        load(path, SST2, BYTES, max_length=10)

    class Bare(ByteTokenizer):
        prefix = ()

    path = jsonl(tmp_path, {"prompt": "", "answer": "7"})
    with pytest.raises(ValueError, match="line 1: the tokenizer turns the prompt '' into no tokens"):
        load(path, Generation(), Bare(), max_length=64)


def test_wrong_tasks_are_refused_by_a_clear_error():
    with pytest.raises(ValueError, match="label_words must name two labels or more, got"):
        Classification("{text}", {"0": " a"})
    with pytest.raises(ValueError, match=r"must name fields in braces, such as '\{text\}'"):
        Generation("prompt")
    with pytest.raises(ValueError, match=r"template '\{text' is not well formed"):
        Classification("{text", {"0": " a", "1": " b"})


def test_short_sentences_are_some_of_all(tmp_path):
    """They end in the adjective, half of them have each label, and so many that the usual splits are full."""
    everything, short = dict(sentiment.sentences()), dict(sentiment.sentences(short=True))
    assert len(short) == 2304 and short.items() <= everything.items() and 2 * sum(short.values()) == len(short)
    files = sentiment.write(tmp_path, short=True)
    texts = [record.text("text") for file in files.values() for record in read_records(file)]
    assert len(set(texts)) == 2200 and set(texts) <= set(short)
    with pytest.raises(ValueError, match="at most 2304, got"):
        sentiment.write(tmp_path, test=2000, short=True)
