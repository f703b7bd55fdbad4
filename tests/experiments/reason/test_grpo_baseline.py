"""GRPO: its gradient is the policy gradient, likelihoods are those of a naive loop, it learns, and nothing from nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll
from eggroll.envs import tasks
from eggroll.envs.tasks import Batches, Row, Scorer, Task
from eggroll.experiments.reason.baseline import Trainer
from eggroll.experiments.reason.grpo import GRPO, Batch, advantages, grpo_loss, log_likelihoods
from eggroll.experiments.reason.problem import Problem, Sampling, Scored, encode_prompt
from eggroll.experiments.reason.prompt_lengths import Lengths
from eggroll.experiments.reason.warm_start import WarmStart
from eggroll.llm.decoder import apply
from eggroll.llm.decoding import Completions
from eggroll.llm.tokenizers import ByteTokenizer
from tests.eggroll.llm.language_models import random_params

pytestmark = pytest.mark.slow

ARCHITECTURES = ("transformer", "rwkv7")
SAMPLING = Sampling(
    max_new_tokens=3, temperature=0.7, top_p=1.0, stop_token_ids=tuple(range(100))
)  # two in five tokens end a text
SETTINGS = GRPO(prompts=2, samples=3)


def mixed(prompts, completions, **_):
    """Differs between completions."""
    return [sum(map(ord, text)) % 7 / 7 for text in completions]


def sevens(prompts, completions, **_):
    return [text.count("7") / 2 for text in completions]


@functools.cache
def problem(architecture="transformer", reward=mixed, dtype=jnp.float32):
    config = WarmStart(architecture=architecture, layers=1, width=16).model
    splits = {split: tuple(Row(f"{split}{'a' * n}", {}) for n in range(2)) for split in ("train", "validation", "test")}
    task, scorer = Task("toy", reward=reward, splits=splits), Scorer(reward, workers=0)
    return Problem(
        None, config, lambda: random_params(config, dtype), ByteTokenizer(), task, "{prompt}", Lengths(8, 8, 8), scorer
    )


trainer_of = functools.cache(Trainer)  # compiled once for all tests


def one_by_one(given, completions):
    """Every completion of the train split behind its prompt, and which of its tokens it has, bool [T - 1].

    There is no padding: texts begin at 0, and what follows a text, up to one length for all, cannot change what is before it.
    """
    rows = [row for row in given.task.split("train") for _ in range(SETTINGS.samples)]
    texts = [encode_prompt(given.tokenizer, given.template, row.prompt) for row in rows]
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
    data = jax.random.key_data(jax.random.split(jax.random.fold_in(jax.random.key(seed), 0))[0])
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
    state, metrics = trainer.step(trainer.init(key=jax.random.key(1)), given.task.split("train"))
    _, completions = drawn_by(given, 1)
    rewards = np.array(mixed(None, given.texts(completions))).reshape(2, 3)
    relative = ((rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, keepdims=True) + 1e-6)).reshape(-1)
    assert metrics.aux.extra["silent"] == 0

    @jax.jit
    def slope(params, whole, weights):  # of the policy gradient: weights are minus the advantage over |o| B
        return jax.grad(lambda params: jnp.sum(weights * naive(given, 0.7)(params, whole)))(params)

    parts = [
        slope(given.params, whole, (-advantage * own / own.sum() / 6).astype(np.float32))
        for advantage, (whole, own) in zip(relative, one_by_one(given, completions), strict=True)
    ]
    gradient = jax.tree.map(lambda *slopes: sum(map(np.asarray, slopes)), *parts)
    norm = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(metrics.gradient_norm, norm, rtol=1e-4)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(SETTINGS.learning_rate))
    updates, _ = jax.jit(lambda gradient: optimizer.update(gradient, optimizer.init(gradient)))(gradient)
    moved = jax.tree.map(lambda after, before: np.asarray(after) - np.asarray(before), state.weights, given.params)
    for got, expected, slopes in zip(*map(jax.tree.leaves, (moved, updates, gradient)), strict=True):
        clear = np.abs(slopes) > 1e-5  # Adam's first step is the sign, which rounding decides where there is no slope
        np.testing.assert_allclose(got[clear], np.asarray(expected)[clear], rtol=2e-2, atol=1e-6)
    assert metrics.mean_fitness == pytest.approx(rewards.mean())
    assert (metrics.aux.tokens, metrics.aux.extra["clipped"]) == (completions.length.sum(), 0)


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
    batch = Batch(None, completions, jnp.array([1.0, -1.0]), old, reference)
    loss, share = grpo_loss(known, batch, **options)
    np.testing.assert_allclose((loss, share), (expected, clipped), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("token_mean", [False, True])
def test_microbatches_take_the_same_step(token_mean, standard_promotion):
    given, steps = problem(), []
    for microbatches in (1, 3):
        settings = dataclasses.replace(SETTINGS, token_mean=token_mean, microbatches=microbatches)
        trainer = Trainer(given, SAMPLING, settings)
        prompts, completions = drawn_by(given, 1)
        batch = Batch(prompts, completions, np.arange(-2, 4, dtype=np.float32), None, None)
        assert len(set(np.asarray(completions.length).reshape(3, 2).sum(axis=1).tolist())) > 1  # parts weigh differently
        trainer.init(key=jax.random.key(0))
        steps.append(jax.jit(trainer._gradient)(given.params, batch))
    for whole, parts in zip(*map(jax.tree.leaves, steps), strict=True):
        np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-6)


def test_it_learns_to_say_seven(standard_promotion):
    given = problem(reward=sevens)
    passes = dict(epochs=2, minibatches=2, optimizer="radam", kl_coefficient=1e-3, global_std=True, token_mean=True)
    settings = GRPO(prompts=2, samples=64, learning_rate=0.02, **passes)
    batches = Batches(given.task.split("train"), batch_size=2)
    trainer = Trainer(given, Sampling(2, 1.0, 1.0, ()), settings)
    state, history = eggroll.train(trainer, trainer.init(key=jax.random.key(0)), batches, generations=40, keep_arrays=True)
    rewards = [record.mean_fitness for record in history]
    assert np.mean(rewards[:3]) < 0.1
    assert np.mean(rewards[-3:]) > 0.8
    assert int(state.generation) == len(history) == 40
    assert any(record.aux.extra["clipped"] for record in history)


def scored(values, has_score):
    none = np.full(len(values), False)
    return tasks.Scores(values, has_score, none, none)


def test_equal_rewards_change_nothing(monkeypatch, standard_promotion):
    given = problem()
    trainer, equal = trainer_of(given, SAMPLING, SETTINGS), scored(np.full(6, 0.1), np.full(6, True))
    monkeypatch.setattr(Problem, "score", lambda *_: Scored([], equal))
    state = trainer.init(key=jax.random.key(0))
    for _ in range(3):
        state, metrics = trainer.step(state, given.task.split("train"))
        assert (metrics.gradient_norm, metrics.aux.extra["silent"]) == (0, 1)
    jax.tree.map(np.testing.assert_array_equal, state.params, given.params)


def test_a_completion_without_a_score_changes_nothing(monkeypatch, standard_promotion):
    given, learned = problem(), []
    trainer, has_score = Trainer(given, SAMPLING, SETTINGS), np.array([True, False, True, True, True, False])
    scores = scored(np.array([1.0, 0.5, 0.0, 1.0, 0.0, 0.4]), has_score)
    monkeypatch.setattr(Problem, "score", lambda *_: Scored([], scores))
    monkeypatch.setattr(trainer, "_learn", lambda run, reference, batch, key: (learned.append(batch), (run, (0.0, 0.0)))[1])
    trainer.step(trainer.init(key=jax.random.key(0)), given.task.split("train"))
    assert learned[0].advantages.dtype == np.float32
    np.testing.assert_array_equal(learned[0].advantages != 0, has_score)


def test_what_follows_a_stop_text_is_not_learned_from(monkeypatch, standard_promotion):
    given, learned = dataclasses.replace(problem(), stop=("4\n",)), []
    trainer = Trainer(given, SAMPLING, SETTINGS)
    drawn = Completions(np.array([[52, 10, 55]] * 6), np.full(6, 3), np.full(6, False))
    monkeypatch.setattr(trainer, "_draw", lambda *_: drawn)
    monkeypatch.setattr(trainer, "_learn", lambda run, reference, batch, key: (learned.append(batch), (run, (0.0, 0.0)))[1])
    _, metrics = trainer.step(trainer.init(key=jax.random.key(0)), given.task.split("train"))
    assert learned[0].completions.length.tolist() == [2] * 6 and metrics.aux.tokens == 18


def test_low_precision_keeps_full_weights(standard_promotion):
    given = problem(dtype=jnp.bfloat16)
    trainer = Trainer(given, SAMPLING, dataclasses.replace(SETTINGS, learning_rate=1e-5))
    state, metrics = trainer.step(trainer.init(key=jax.random.key(1)), given.task.split("train"))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.weights)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("bfloat16")}
    before = np.asarray(given.params["resident"]["final_norm"]).astype(np.float32)
    moved = np.abs(state.weights["resident"]["final_norm"] - before)
    assert 0 < moved.max() < 2e-5  # less than bfloat16 tells from 1
    assert np.isfinite(metrics.gradient_norm)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"samples": 1}, "samples must be an integer >= 2"),
        ({"minibatches": 4}, "minibatches must divide the 6 completions"),
        ({"microbatches": 4}, "microbatches must divide the 6 completions of a minibatch"),
        ({"clip": 0.0}, "clip must be a finite number > 0"),
        ({"optimizer": "sgd"}, "optimizer must be adam or radam"),
        ({"kl_coefficient": -1.0}, "kl_coefficient must be a finite number >= 0"),
    ],
)
def test_settings_that_cannot_run_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        Trainer(problem(), SAMPLING, dataclasses.replace(SETTINGS, **bad))


def test_sampling_without_likelihoods_is_refused():
    for bad in (SAMPLING._replace(temperature=0.0), SAMPLING._replace(top_p=0.9)):
        with pytest.raises(ValueError, match="GRPO needs temperature > 0 and top_p 1"):
            Trainer(problem(), bad, SETTINGS)
