"""GRPO: its gradient is the policy gradient, likelihoods are those of a naive loop, it learns, and nothing from nothing."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eggroll.envs import tasks
from eggroll.envs.tasks import Batches, Row, Scorer, Task
from eggroll.experiments.reason import grpo
from eggroll.experiments.reason.grpo import GRPO, make, train
from eggroll.experiments.reason.grpo_loss import Drawn, advantages, grpo_loss, log_likelihoods
from eggroll.experiments.reason.problem import Judged, Problem, Sampling
from eggroll.experiments.reason.warm_start import Start
from eggroll.llm.decoder import apply
from eggroll.llm.decoding import Completions
from eggroll.llm.tokenizers import ByteTokenizer
from tests.eggroll.llm.language_models import random_params

pytestmark = pytest.mark.slow

ARCHITECTURES = ("transformer", "rwkv7")
SAMPLING = Sampling(room=3, temperature=0.7, top_p=1.0, ending=tuple(range(100)))  # two in five tokens end a text
SETTINGS = GRPO(prompts=2, samples=3)


def mixed(prompts, completions, **_):
    """Differs between completions."""
    return [sum(map(ord, text)) % 7 / 7 for text in completions]


def sevens(prompts, completions, **_):
    return [text.count("7") / 2 for text in completions]


@functools.cache
def problem(architecture="transformer", reward=mixed, dtype=jnp.float32):
    config = Start(architecture=architecture, layers=1, width=16).model
    splits = {split: tuple(Row(f"{split}{'a' * n}", {}) for n in range(2)) for split in ("train", "validation", "test")}
    task, scorer = Task("toy", reward=reward, splits=splits), Scorer(reward, workers=0)
    return Problem(None, config, random_params(config, dtype), ByteTokenizer(), task, "{prompt}", 8, scorer)


trainer_of = functools.cache(make)  # compiled once for all tests


def one_by_one(given, completions):
    """Every completion of the train split behind its prompt, and which of its tokens it has, bool [T - 1].

    There is no padding: texts begin at 0, and what follows a text, up to one length for all, cannot change what is before it.
    """
    texts = [given.tokens(row.prompt) for row in given.task.split("train") for _ in range(SETTINGS.samples)]
    for text, tokens, length in zip(texts, np.asarray(completions.tokens), np.asarray(completions.length), strict=True):
        whole = np.resize(np.array([*text, *tokens[:length]], np.int32), 11)
        places = np.arange(1, 11)
        yield whole, (places >= len(text)) & (places < len(text) + length)


@functools.cache
def naive(given, temperature):
    """The log-likelihood of every token of a text but the first, float32 [T - 1]."""

    def known(params, whole):
        logits = apply(given.decoder, params, whole[None], jnp.ones((1, len(whole)), bool))[0]
        return jnp.take_along_axis(jax.nn.log_softmax(logits / temperature)[:-1], whole[1:, None], axis=1)[:, 0]

    return jax.jit(known)


@functools.cache
def drawn_by(given, seed):
    """What a step draws with a key of this seed."""
    prompts = given.prompts(given.task.split("train"), samples=SETTINGS.samples)
    data = jax.random.key_data(jax.random.split(jax.random.key(seed))[0])
    return prompts, jax.jit(lambda: given.complete(given.params, prompts, data, sampling=SAMPLING))()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_likelihoods_are_those_of_a_naive_loop(architecture, standard_promotion):
    given = problem(architecture)
    prompts, completions = drawn_by(given, 1)
    assert len(set(np.asarray(completions.length).tolist())) > 1  # padding on both sides
    scored = jax.jit(functools.partial(log_likelihoods, given.decoder, temperature=0.7))
    known = np.asarray(scored(given.params, prompts, completions))
    for row, (whole, own) in zip(known, one_by_one(given, completions), strict=True):
        expected, hotter = (naive(given, temperature)(given.params, whole)[own] for temperature in (0.7, 1.0))
        np.testing.assert_allclose(row[: own.sum()], expected, atol=2e-5)
        assert (row[own.sum() :] == 0).all()
        assert not np.allclose(expected, hotter, atol=1e-4)  # the temperature matters


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_step_follows_the_policy_gradient(architecture, standard_promotion):
    given = problem(architecture)
    trainer = trainer_of(given, SAMPLING, SETTINGS)
    run, report = trainer.step(trainer.init(), given.task.split("train"), key=jax.random.key(1))
    _, completions = drawn_by(given, 1)
    rewards = np.array(mixed(None, given.texts(completions))).reshape(2, 3)
    relative = ((rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, keepdims=True) + 1e-6)).reshape(-1)
    assert report.silent == 0

    @jax.jit
    def slope(params, whole, weights):  # of the policy gradient: weights are minus the advantage over |o| B
        return jax.grad(lambda params: jnp.sum(weights * naive(given, 0.7)(params, whole)))(params)

    parts = [
        slope(given.params, whole, (-advantage * own / own.sum() / 6).astype(np.float32))
        for advantage, (whole, own) in zip(relative, one_by_one(given, completions), strict=True)
    ]
    gradient = jax.tree.map(lambda *slopes: sum(map(np.asarray, slopes)), *parts)
    norm = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(report.gradient_norm, norm, rtol=1e-4)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(SETTINGS.learning_rate))
    updates, _ = jax.jit(lambda gradient: optimizer.update(gradient, optimizer.init(gradient)))(gradient)
    moved = jax.tree.map(lambda after, before: np.asarray(after) - np.asarray(before), run.params, given.params)
    for got, expected, slopes in zip(*map(jax.tree.leaves, (moved, updates, gradient)), strict=True):
        clear = np.abs(slopes) > 1e-5  # Adam's first step is the sign, which rounding decides where there is no slope
        np.testing.assert_allclose(got[clear], np.asarray(expected)[clear], rtol=2e-2, atol=1e-6)
    assert (report.reward, report.tokens, report.clipped) == (pytest.approx(rewards.mean()), completions.length.sum(), 0)


def test_advantages_by_hand():
    rewards = np.array([[0.0, 1.0], [0.0, 0.0], [2.0, 0.0]])
    np.testing.assert_allclose(advantages(rewards), [[-1, 1], [0, 0], [1, -1]], rtol=1e-5)
    spread = np.sqrt(np.mean(rewards**2) - 0.25)
    np.testing.assert_allclose(
        advantages(rewards, global_std=True), np.array([[-0.5, 0.5], [0, 0], [1, -1]]) / spread, rtol=1e-5
    )
    assert (advantages(np.full((2, 3), 0.1)) == 0).all()  # exactly: the mean of three 0.1 is not 0.1


@pytest.mark.parametrize(
    ("options", "expected", "clipped"),
    [
        (dict(clip=0.2), -((1.2 + 1.0) / 2 - 1.5) / 2, 1 / 3),  # a gain is held at 1.2, a loss is not
        (dict(clip=0.6), -((1.5 + 1.0) / 2 - 1.5) / 2, 0),
        (dict(clip=0.2, token_mean=True), -(1.2 + 1.0 - 1.5) / 3, 1 / 3),
        (dict(clip=0.2, kl_coefficient=2.0), -((1.2 + 1.0) / 2 - 1.5 - 2 * (2 - np.log(2) - 1) * 2) / 2, 1 / 3),
    ],
)
def test_loss_by_hand(options, expected, clipped):
    completions = Completions(jnp.zeros((2, 2), jnp.int32), jnp.array([2, 1]), jnp.ones(2, bool))
    old = jnp.array([[-1.0, -2.0], [-3.0, 0.0]])
    known = old + jnp.log(jnp.array([[1.5, 1.0], [1.5, 1.0]]))
    reference = known + jnp.log(2.0) if "kl_coefficient" in options else None
    drawn = Drawn(None, completions, jnp.array([1.0, -1.0]), old, reference)
    loss, share = grpo_loss(known, drawn, **options)
    np.testing.assert_allclose((loss, share), (expected, clipped), rtol=1e-5, atol=1e-7)


def test_it_learns_to_say_seven(standard_promotion):
    given, reports = problem(reward=sevens), []
    passes = dict(epochs=2, minibatches=2, optimizer="radam", kl_coefficient=1e-3, global_std=True, token_mean=True)
    settings = GRPO(prompts=2, samples=64, learning_rate=0.02, **passes)
    batches = Batches(given.task.split("train"), batch_size=2)

    def on_step(params, step, seconds, report):
        reports.append(report)

    ended = train(given, settings, sampling=Sampling(2, 1.0, 1.0, ()), batches=batches, steps=40, on_step=on_step)
    assert np.mean([report.reward for report in reports[:3]]) < 0.1
    assert np.mean([report.reward for report in reports[-3:]]) > 0.8
    assert (ended.steps, len(reports)) == (40, 40)
    assert any(report.clipped for report in reports)


def test_equal_rewards_change_nothing(monkeypatch, standard_promotion):
    given = problem()
    trainer, equal = trainer_of(given, SAMPLING, SETTINGS), tasks.Scores(np.full(6, 0.1), 0, 0, None, 0.0)
    monkeypatch.setattr(Problem, "judge", lambda *_: Judged([], equal))
    run = trainer.init()
    for seed in range(3):
        run, report = trainer.step(run, given.task.split("train"), key=jax.random.key(seed))
        assert (report.gradient_norm, report.silent) == (0, 1)
    jax.tree.map(np.testing.assert_array_equal, trainer.policy(run), given.params)


def test_low_precision_keeps_full_weights(standard_promotion):
    given = problem(dtype=jnp.bfloat16)
    trainer = make(given, SAMPLING, dataclasses.replace(SETTINGS, learning_rate=1e-5))
    run, report = trainer.step(trainer.init(), given.task.split("train"), key=jax.random.key(1))
    assert {leaf.dtype for leaf in jax.tree.leaves(run.params)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(trainer.policy(run))} == {jnp.dtype("bfloat16")}
    before = np.asarray(given.params["resident"]["final_norm"]).astype(np.float32)
    moved = np.abs(run.params["resident"]["final_norm"] - before)
    assert 0 < moved.max() < 2e-5  # less than bfloat16 tells from 1
    assert np.isfinite(report.gradient_norm)


def test_seconds_leave_out_what_is_done_after_a_step(monkeypatch, standard_promotion):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(grpo, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(grpo, "make", trainer_of)
    given, seen = problem(), []

    def on_step(params, step, seconds, report):
        clock.now += 100
        seen.append((step, seconds))
        return step == 2

    ended = train(
        given, SETTINGS, sampling=SAMPLING, batches=lambda step: given.task.split("train"), seconds=5, on_step=on_step
    )
    assert seen == [(1, 0.0), (2, 0.0)]
    assert (ended.steps, ended.seconds) == (2, 0.0)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"samples": 1}, "samples must be an integer >= 2"),
        ({"minibatches": 4}, "minibatches must divide the 6 completions"),
        ({"clip": 0.0}, "clip must be a finite number > 0"),
        ({"optimizer": "sgd"}, "optimizer must be adam or radam"),
        ({"kl_coefficient": -1.0}, "kl_coefficient must be a finite number >= 0"),
    ],
)
def test_settings_that_cannot_run_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        make(problem(), SAMPLING, dataclasses.replace(SETTINGS, **bad))


def test_sampling_without_likelihoods_is_refused():
    for bad in (SAMPLING._replace(temperature=0.0), SAMPLING._replace(top_p=0.9)):
        with pytest.raises(ValueError, match="GRPO needs temperature > 0 and top_p 1"):
            make(problem(), bad, SETTINGS)


def test_a_run_without_limit_is_refused():
    with pytest.raises(ValueError, match="steps or seconds must be given"):
        train(problem(), SETTINGS, sampling=SAMPLING, batches=lambda step: [])
