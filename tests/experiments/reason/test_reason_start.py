"""The small model of a reasoning run: what it learns from, both architectures, the folder it is kept in."""

import dataclasses

import jax
import numpy as np
import pytest

from eggroll.envs.tasks import Row, Task, load, number_matches
from eggroll.experiments.common import warm_start as common
from eggroll.experiments.reason import warm_start as start
from eggroll.experiments.reason.warm_start import WarmStart, encode_examples, train, warm_start
from eggroll.llm import hf
from eggroll.llm.tokenizers import ByteTokenizer

pytestmark = pytest.mark.slow

TINY = WarmStart(layers=1, width=16, steps=3, batch_size=4)
ARCHITECTURES = ("transformer", "rwkv7")


def small_task(**options):
    return load("arithmetic", train=64, validation=8, test=8, **options)


def test_examples_are_a_prompt_and_its_worked_text():
    examples = encode_examples([("a=", "12\n"), ("bcd=", "7\n")])
    decode = ByteTokenizer().decode
    assert [decode(row[mask]) for row, mask in zip(examples.tokens, examples.mask, strict=True)] == ["a=12\n", "bcd=7\n"]
    assert [decode(row[target]) for row, target in zip(examples.tokens, examples.targets, strict=True)] == ["12\n", "7\n"]
    assert examples.tokens.shape == (2, 7)
    assert (examples.tokens[~examples.mask] == 0).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_model_learns_one_example_by_heart(architecture, standard_promotion):
    settings = dataclasses.replace(TINY, architecture=architecture, steps=40, learning_rate=3e-2)
    examples = encode_examples([("3+4=", "7\n")])
    params = train(settings, examples)
    decoder = hf.make_decoder(settings.model)
    logits = jax.jit(lambda params: start.apply(decoder, params, examples.tokens, examples.mask))(params)
    assert np.asarray(logits).argmax(-1)[0, -3:-1].tolist() == list(b"7\n")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_folder_is_read_back_and_made_once(architecture, tmp_path, standard_promotion, monkeypatch):
    settings = dataclasses.replace(TINY, architecture=architecture)
    folder = warm_start(settings, small_task(), template="{prompt}", cache=tmp_path / "starts")
    config, _, params = hf.load(folder)
    assert config == settings.model
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    monkeypatch.setattr(start, "train", None)  # not called again
    assert warm_start(settings, small_task(), template="{prompt}", cache=tmp_path / "starts") == folder


@pytest.mark.parametrize("change", ["settings", "noise", "template"])
def test_another_folder_for_whatever_decides_the_model(change, tmp_path, monkeypatch):
    monkeypatch.setattr(start, "train", lambda settings, examples: None)
    monkeypatch.setattr(common.hf, "save", lambda *_: None)

    def folder(settings=TINY, noise=0.0, template="{prompt}"):
        return warm_start(settings, small_task(noise=noise), template=template, cache=tmp_path / "starts")

    other = {
        "settings": {"settings": dataclasses.replace(TINY, steps=4)},
        "noise": {"noise": 0.1},
        "template": {"template": "? {prompt}"},
    }
    assert folder() == folder()
    assert folder() != folder(**other[change])


def test_task_without_worked_examples_is_refused(tmp_path):
    splits = {name: (Row(name, {"answer": "1"}),) for name in ("train", "validation", "test")}
    task = Task("plain", reward=number_matches, splits=splits)
    with pytest.raises(ValueError, match="must have the column 'worked' for a warm start, 'plain' has"):
        warm_start(TINY, task, template="{prompt}", cache=tmp_path / "starts")


@pytest.mark.parametrize(
    "bad", [{"width": 24}, {"steps": 0}, {"learning_rate": float("nan")}, {"noise": 2.0}, {"architecture": "opt"}]
)
def test_settings_that_make_no_model_are_refused(bad):
    with pytest.raises(ValueError, match=f"start.{next(iter(bad))} must be"):
        dataclasses.replace(TINY, **bad).check()
