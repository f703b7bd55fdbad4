"""The benchmark of decoding populations, in small: its numbers belong together and both of its forms do the same work."""

import dataclasses
import json

import numpy as np
import pytest

import eggroll
from eggroll.experiments.bench import decode
from eggroll.llm import hf

TINY = decode.Decode(
    members=8, growth=(), prompts=2, max_new_tokens=3, chunk_size=4, layers=1, width=16, repeats=1, dense_repeats=0
)


pytestmark = pytest.mark.slow


models = decode._models


def transformer():
    return models(TINY)["transformer"]


def test_last_line_is_json_with_every_number(capsys, monkeypatch):
    monkeypatch.setattr(decode, "_models", lambda config: {"transformer": models(config)["transformer"]})
    decode.run(TINY)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["model", *decode.COLUMNS] and lines[2].split()[0] == "transformer"
    summary = json.loads(lines[-1])
    row = summary["transformer"]
    assert set(row) == {*decode.COLUMNS, "growth"} and [found["members"] for found in row["growth"]] == [8]
    assert row["ratio"] == pytest.approx(row["tokens_per_second"] / row["unperturbed_tokens_per_second"])
    cache = 2 * 2 * (decode.LONGEST + 3) * 16 * 4  # keys and values of one layer: texts, tokens, width, bytes
    assert cache < row["memory_per_member"] < 20 * cache and row["temporary_bytes"] > 4 * cache
    assert row["dense_ratio"] is None and summary["about"]["device"] and summary["about"]["load"] >= 0


def test_a_checkpoint_is_timed_in_parts(capsys, tmp_path):
    pytest.importorskip("safetensors")
    hf.save(tmp_path, *transformer())
    decode.run(decode.Decode(model=tmp_path, max_new_tokens=3, repeats=1))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["model", *decode.MODEL_COLUMNS] and lines[2].split()[0] == "qwen3"
    row = json.loads(lines[-1])["model"]
    assert list(row) == [*decode.MODEL_COLUMNS] and row["members"] == 8 and row["prefill_ratio"] > 0
    assert row["ratio"] == pytest.approx(row["tokens_per_second"] / row["unperturbed_tokens_per_second"])
    for options, sentence in (
        ({"prompts": 3}, "must divide the 64 texts"),
        ({"growth": ()}, "--growth has no effect with --model"),
    ):
        with pytest.raises(SystemExit, match=sentence):
            decode.run(dataclasses.replace(decode.Decode(model=tmp_path), **options))


def test_without_noise_both_forms_give_the_same_texts():
    model, params = transformer()
    work = decode._work(model, params, TINY, members=8)
    es, state = decode._strategy(work, eggroll.LowRank(), 4)
    population = decode._decoding(work, es, state._replace(sigma=0.0 * state.sigma))()
    unperturbed = decode._unperturbed(work, 4)()
    np.testing.assert_array_equal(population.tokens.reshape(-1, 3), unperturbed.tokens.reshape(-1, 3))
    assert len(np.unique(unperturbed.tokens)) > 1 and not population.ended.any() and (population.length == 3).all()
    given = work.prompts.mask.sum(axis=-1)
    assert given.min() == decode.SHORTEST and given.max() == decode.LONGEST and work.prompts.mask[..., -1].all()


def test_models_are_of_bytes():
    for name, (config, params) in decode._models(TINY).items():
        assert params["resident"]["embed"].shape == (257, 16) and (config.model_type == "rwkv7") == (name == "rwkv7")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"members": 12}, "members must be a multiple of twice chunk_size 4, got 12"),
        ({"growth": (6,)}, "members must be a multiple of twice chunk_size 4, got 6"),
        ({"width": 20}, "width must be a multiple of 16 for a transformer, got 20"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer >= 1, got 0"),
        ({"rank": 0}, "rank must be an integer >= 1, got 0"),
        ({"chunk_size": 0}, "chunk_size must be an integer >= 1, got 0"),
        ({"repeats": 0}, "repeats must be an integer >= 1, got 0"),
    ],
)
def test_wrong_options_are_refused_by_a_clear_error(options, sentence):
    with pytest.raises(SystemExit, match=f"error: {sentence}"):
        decode.run(dataclasses.replace(TINY, **options))
