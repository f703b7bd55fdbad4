"""The PPO baseline: hand-computed advantages, distributions against their definitions, whole runs."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eggroll import envs
from eggroll.experiments.rl import distributions
from eggroll.experiments.rl.baseline import PolicyGradient
from eggroll.experiments.rl.collect import ActorCritic, Step, advantages, collect, reset
from eggroll.experiments.rl.config import Config
from eggroll.experiments.rl.networks import MLP
from eggroll.experiments.rl.ppo import PPO, _optimizer, make_trainer
from tests.tables import slow

LOG_STD = jnp.array([-0.5, 0.25])
BOX = envs.Continuous((2,), np.full(2, -1, np.float32), np.full(2, 1, np.float32))


def steps_of(**fields):
    """A `Step` with these fields; the others are None."""
    return Step(**dict.fromkeys(Step._fields) | fields)


def counter(*, terminates, limit=3):
    """An environment whose observation counts the steps; reward 1; it ends after `limit` steps."""

    def reset(key):
        return jnp.zeros(1), jnp.int32(0)

    def step(key, state, action):
        end = state + 1 >= limit
        state = state + 1
        observation = state.astype(jnp.float32)[None]
        return envs.Transition(observation, state, jnp.float32(1), end & terminates, end & (not terminates))

    space = envs.Discrete(2)
    return envs.Environment("counter", reset=reset, step=step, observation_shape=(1,), action_space=space, max_steps=limit)


def test_advantages_against_a_table_by_hand():
    """gamma 0.5, lambda 0.5. Step 1 terminates (next value ignored), step 3 is truncated (next value counts)."""
    steps = steps_of(
        reward=jnp.array([1.0, 2.0, 3.0, 4.0, 5.0]),
        value=jnp.array([10.0, 20.0, 30.0, 40.0, 50.0]),
        next_value=jnp.array([20.0, 99.0, 40.0, 8.0, 60.0]),
        terminated=jnp.array([False, True, False, False, False]),
        done=jnp.array([False, True, False, True, False]),
    )
    # delta = 1 + 10 - 10, 2 + 0 - 20, 3 + 20 - 30, 4 + 4 - 40, 5 + 30 - 50 = 1, -18, -7, -32, -15
    # A_4 = -15; A_3 = -32; A_2 = -7 + 0.25 * -32 = -15; A_1 = -18; A_0 = 1 + 0.25 * -18 = -3.5
    got = advantages(steps, gamma=0.5, gae_lambda=0.5)
    np.testing.assert_allclose(got, [-3.5, -18, -15, -32, -15])
    # Rewards twice as large add 1, 2, ..., 5 to the errors.
    twice = advantages(steps, gamma=0.5, gae_lambda=0.5, reward_scale=2.0)
    np.testing.assert_allclose(twice - got, [1 + 0.25 * 2, 2, 3 + 0.25 * 4, 4, 5])


@pytest.mark.parametrize("terminates", [True, False])
def test_rollout_resets_and_keeps_the_last_observation(terminates):
    environment = counter(terminates=terminates)
    model = ActorCritic(environment, MLP((), 2), MLP((), 1), normalise=False)
    params = model.init(jax.random.key(0))
    lanes = reset(environment, num_envs=2, key=jax.random.key(1))
    statistics = envs.initial_statistics((1,))
    lanes, steps = collect(model, params, lanes, statistics=statistics, steps=7, gamma=0.5, key=jax.random.key(2))
    assert steps.observation[:, 0, 0].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert steps.done[:, 1].tolist() == [False, False, True] * 2 + [False]
    assert bool(steps.terminated.any()) is terminates
    assert steps.episode_return[:, 0].tolist() == [1, 2, 3, 1, 2, 3, 1]
    assert steps.discounted_return[:, 0].tolist() == [1, 1.5, 1.75, 1, 1.5, 1.75, 1]
    last = model.value(params, jnp.array([3.0]))
    np.testing.assert_allclose(steps.next_value[2, 0], last, rtol=1e-6)
    assert lanes.observation.tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize(
    ("space", "raws"),
    [
        (envs.Discrete(3), [0, 1, 2]),
        slow(envs.MultiDiscrete((2, 3)), list(itertools.product(range(2), range(3)))),
        (envs.PerAgent(2, envs.Discrete(3)), list(itertools.product(range(3), range(3)))),
    ],
    ids=["discrete", "multi-discrete", "per agent"],
)
def test_discrete_distributions(space, raws):
    """Probabilities of all actions add up to 1, give the entropy, and are those of the draws; masked ones are 0."""
    shape = (2, 3) if isinstance(space, envs.PerAgent) else (envs.output_size(space),)
    output = jax.random.normal(jax.random.key(0), shape)
    mask = jnp.ones(shape, bool).at[(*[0] * (len(shape) - 1), 0)].set(False)
    actions = jnp.array(raws, jnp.int32)
    no_std = jnp.zeros(0)
    judge = jax.vmap(lambda raw: distributions.log_prob_and_entropy(space, output, no_std, raw, mask=mask))
    log_probs, entropies = judge(actions)
    probs = np.exp(np.asarray(log_probs))
    positive = probs[probs > 0]
    assert probs.sum() == pytest.approx(1, abs=1e-5) and len(positive) < len(raws)
    np.testing.assert_allclose(entropies, -(positive * np.log(positive)).sum(), rtol=1e-5)
    draw = jax.vmap(lambda key: distributions.sample(space, output, no_std, key=key, mask=mask))
    drawn = np.asarray(draw(jax.random.split(jax.random.key(1), 4000))).reshape(4000, -1)
    share = np.array([(drawn == np.ravel(raw)).all(axis=1).mean() for raw in raws])
    assert (np.abs(share - probs) <= 5 * np.sqrt(probs * (1 - probs) / 4000)).all()
    gradient = jax.grad(lambda x: distributions.log_prob_and_entropy(space, x, no_std, actions[-1], mask=mask)[1])(output)
    assert jnp.isfinite(gradient).all()


def test_continuous_distribution():
    output, raw = jnp.array([0.3, -0.2]), jnp.array([0.1, 0.4])
    log_prob, entropy = distributions.log_prob_and_entropy(BOX, output, LOG_STD, raw)
    expected = jax.scipy.stats.norm.logpdf(raw, output, jnp.exp(LOG_STD)).sum()
    assert float(log_prob) == pytest.approx(float(expected), rel=1e-5)
    assert float(entropy) == pytest.approx(sum(0.5 * math.log(2 * math.pi * math.e) + s for s in (-0.5, 0.25)), rel=1e-5)
    draws = jax.vmap(lambda key: distributions.sample(BOX, output, LOG_STD, key=key))(jax.random.split(jax.random.key(0), 4000))
    std = np.exp(np.asarray(LOG_STD))
    assert (np.abs((draws.mean(axis=0) - output) / (std / math.sqrt(4000))) < 5).all()
    assert (np.abs(np.asarray(draws).std(axis=0) / std - 1) < 5 / math.sqrt(2 * 4000)).all()
    np.testing.assert_allclose(distributions.to_action(BOX, raw), np.tanh(raw), rtol=1e-6)


def whole_run(trainer):
    """A function from key to the learner after all updates and their metrics, stacked."""

    def train(key):
        run, metrics = jax.lax.scan(lambda run, _: trainer.advance(run), trainer.start(key), length=trainer.updates)
        return run.learner, metrics

    return train


def small_train(environment, *, env_steps=96):
    config = PPO(num_envs=4, rollout_steps=8, epochs=2, minibatches=2)
    outputs = envs.output_size(environment.action_space)
    return whole_run(make_trainer(config, environment, actor=MLP((8,), outputs), critic=MLP((8,), 1), env_steps=env_steps))


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_seeds_vmap_and_are_reproducible():
    first, second = jax.random.split(jax.random.key(0))
    learner, metrics = jax.jit(jax.vmap(small_train(envs.make("Pendulum-v1"))))(jnp.stack([first, second, first]))
    assert metrics.loss.shape == (3, 3) and jnp.isfinite(metrics.loss).all()
    assert learner.statistics.number.tolist() == [96.0] * 3
    for leaf in jax.tree.leaves(learner.params):
        np.testing.assert_allclose(leaf[0], leaf[2], rtol=1e-6)
    assert (metrics.loss[0] != metrics.loss[1]).all()


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("bad", [slow(jnp.nan), 2e19], ids=["nan", "square"])
def test_an_observation_that_is_not_finite_is_counted_and_ends_the_episode(bad):
    sound = counter(terminates=True, limit=5)

    def step(key, state, action):
        after = sound.step(key, state, action)
        return after._replace(observation=jnp.where(state == 1, bad, after.observation))

    broken = envs.Environment(
        "broken", reset=sound.reset, step=step, observation_shape=(1,), action_space=envs.Discrete(2), max_steps=5
    )
    learner, metrics = jax.jit(small_train(broken, env_steps=32))(jax.random.key(0))
    assert int(metrics.invalid[0]) == 16 and float(metrics.mean_return[0]) == 1.0  # every second step
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((learner.params, learner.statistics)))


@pytest.mark.usefixtures("standard_promotion")
def test_a_first_observation_that_is_not_finite_is_counted_and_poisons_nothing():
    sound = counter(terminates=True, limit=5)

    def reset(key):
        return jnp.where(jax.random.bernoulli(key), jnp.nan, 0.0)[None], jnp.int32(0)

    broken = dataclasses.replace(sound, name="broken", reset=reset)
    learner, metrics = jax.jit(small_train(broken, env_steps=64))(jax.random.key(0))
    assert 0 < int(metrics.invalid.sum()) < 64
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((learner.params, learner.statistics)))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_envs": 0}, "ppo.num_envs must be an integer >= 1, got 0."),
        ({"gamma": 2.0}, "ppo.gamma must be a number from 0 to 1, got 2.0."),
        ({"learning_rate": float("nan")}, "ppo.learning_rate must be a finite number > 0, got nan."),
        ({"value_clip": -1.0}, "ppo.value_clip must be a finite number > 0, got -1.0."),
        ({"num_envs": 3, "rollout_steps": 5}, "ppo.minibatches must divide the 15 steps of a rollout, got 4."),
    ],
)
def test_settings_that_cannot_run(settings, words):
    with pytest.raises(ValueError) as raised:
        PPO(**settings).check()
    assert str(raised.value) == words


@pytest.mark.usefixtures("standard_promotion")
def test_gradients_are_clipped_unless_it_is_switched_off():
    gradient = {"w": jnp.full(4, 1e3)}
    for limit in (0.5, None):
        optimizer = _optimizer(PPO(max_gradient_norm=limit), updates=1)
        first = optimizer.update(gradient, optimizer.init(gradient))[1]
        assert (float(optax.tree.norm(first[-1][0].mu)) < 1) == (limit is not None)


def test_several_processes_are_refused(monkeypatch):
    """Each would write the metrics."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="algorithm ppo runs in one process, this run has 2"):
        PolicyGradient(Config(algorithm="ppo"), None, None, critic=None)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_learns_cartpole():
    environment = envs.make("CartPole-v1")
    network = MLP((32, 32), 2)
    trainer = make_trainer(PPO(), environment, actor=network, critic=MLP((32, 32), 1), env_steps=200_000)
    learner, _ = jax.jit(whole_run(trainer))(jax.random.key(0))
    policy = envs.network_policy(environment, lambda x: network.apply(learner.params["actor"], x))
    played = envs.run_episodes(environment, policy, key=jax.random.key(1), episodes=50, statistics=learner.statistics)
    assert float(played.total_reward.mean()) > 400
