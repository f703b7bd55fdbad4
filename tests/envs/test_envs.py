"""Environments: the adapter against gymnax itself, rollouts against hand-written ones, statistics against numpy."""

import dataclasses
import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eggroll import envs
from eggroll.envs.adapter import allow_old_clip, split_variant
from eggroll.envs.normalisation import ObservationSums, add_observation, initial_sums
from eggroll.envs.registry import SUITES
from eggroll.envs.suites.gymnax import adapt, names


def counting(*, ends_at=None, max_steps=20, reward=lambda t: jnp.float32(1), observe=lambda t: t.astype(jnp.float32)[None]):
    """Observation and reward are functions of the step t; the task ends at step `ends_at`, or one drawn at reset."""

    def reset(key):
        end = jax.random.randint(key, (), 1, max_steps) if ends_at is None else jnp.int32(ends_at)
        return observe(jnp.int32(0)), (jnp.int32(0), end)

    def step(key, state, action):
        t, end = state[0] + 1, state[1]
        return envs.Transition(observe(t), (t, end), reward(t), t >= end, jnp.bool_(False))

    space = envs.Discrete(2)
    return envs.Environment("counting", reset=reset, step=step, observation_shape=(1,), action_space=space, max_steps=max_steps)


def stay(observation, key):
    """Always action 0."""
    return jnp.int32(0)


# --- rollout ------------------------------------------------------------------------------------------------------------


def test_episode_ends_where_the_task_does():
    episode = envs.run_episode(counting(ends_at=7), stay, key=jax.random.key(0))
    assert (float(episode.total_reward), int(episode.steps)) == (7.0, 7)


def test_episode_ends_at_max_steps():
    episode = envs.run_episode(counting(ends_at=1000, max_steps=20), stay, key=jax.random.key(0))
    assert (float(episode.total_reward), int(episode.steps)) == (20.0, 20)


def test_a_time_limit_truncates():
    environment = envs.with_time_limit(counting(ends_at=9), 4)
    assert envs.run_episode(environment, stay, key=jax.random.key(0)).steps == 4
    _, state = environment.reset(jax.random.key(0))
    flags = []
    for _ in range(4):
        made = environment.step(jax.random.key(0), state, jnp.int32(0))
        state = made.state
        flags.append((bool(made.terminated), bool(made.truncated)))
    assert flags == [(False, False)] * 3 + [(False, True)]
    assert envs.run_episode(envs.with_time_limit(counting(ends_at=3), 4), stay, key=jax.random.key(0)).steps == 3
    masked = envs.with_time_limit(matching(masked=True), 2)
    assert masked.action_mask(masked.reset(jax.random.key(0))[1]).tolist() == [True, True, False]


@pytest.mark.parametrize("max_steps", [0, -1, 1.5])
def test_bad_time_limit(max_steps):
    with pytest.raises(ValueError, match="max_steps must be an integer >= 1"):
        envs.with_time_limit(counting(), max_steps)


@pytest.mark.parametrize("max_steps", [0, 4.0, None])
def test_an_environment_without_steps_is_refused(max_steps):
    with pytest.raises(ValueError, match=f"env 'counting' must have max_steps, an integer >= 1, got {max_steps}"):
        counting(ends_at=3, max_steps=max_steps)


def test_a_task_that_is_over_at_reset_takes_one_step():
    episodes = envs.run_episodes(counting(ends_at=0), stay, key=jax.random.key(0), episodes=2)
    assert (episodes.total_reward.tolist(), episodes.steps.tolist()) == ([1.0, 1.0], [1, 1])


@pytest.mark.parametrize(
    ("observation", "got"), [(jnp.zeros(3), "(3,)"), (jnp.float32(0), "()"), (jnp.zeros((1, 1)), "(1, 1)")]
)
@pytest.mark.parametrize("function", ["reset", "step"])
def test_observations_of_another_shape_are_refused(function, observation, got):
    right = counting(ends_at=3)

    def reset(key):
        return observation, right.reset(key)[1]

    def step(key, state, action):
        return right.step(key, state, action)._replace(observation=observation)

    wrong = dataclasses.replace(right, **{function: {"reset": reset, "step": step}[function]})
    words = f"env 'counting' must give observations of its observation_shape (1,), got {got}."
    with pytest.raises(ValueError, match=re.escape(words)):
        envs.run_episodes(wrong, stay, key=jax.random.key(0), episodes=2)


def test_side_by_side_equals_one_by_one():
    environment, key = counting(), jax.random.key(1)
    together = envs.run_episodes(environment, stay, key=key, episodes=6)
    alone = [envs.run_episode(environment, stay, key=one) for one in jax.random.split(key, 6)]
    assert len(set(together.steps.tolist())) > 1
    jax.tree.map(np.testing.assert_array_equal, together, jax.tree.map(lambda *x: jnp.stack(x), *alone))


def test_side_by_side_stops_with_the_last():
    """The longest episode decides how often the body runs."""
    runs = []

    def counted(observation, key):
        jax.debug.callback(lambda: runs.append(1))
        return jnp.int32(0)

    episodes = envs.run_episodes(counting(max_steps=1000, ends_at=5), counted, key=jax.random.key(0), episodes=1)
    jax.block_until_ready(episodes)
    jax.effects_barrier()
    assert len(runs) == 5


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_bad_reward_gives_nan_and_ends_the_episode(bad):
    environment = counting(ends_at=9, reward=lambda t: jnp.where(t == 3, jnp.float32(bad), 1.0))
    episode = envs.run_episode(environment, stay, key=jax.random.key(0))
    assert jnp.isnan(episode.total_reward) and int(episode.steps) == 3


@pytest.mark.parametrize("bad", [jnp.nan, -2e19])  # the square of which is infinite
@pytest.mark.parametrize("when", [0, 4])
def test_bad_observation_gives_nan_and_ends_the_episode(when, bad):
    environment = counting(ends_at=9, observe=lambda t: jnp.where(t == when, bad, 0.0)[None])
    episode = envs.run_episode(environment, stay, key=jax.random.key(0))
    assert jnp.isnan(episode.total_reward) and int(episode.steps) == max(when, 1)


def test_keys_of_steps_differ():
    def noisy(observation, key):
        return (jax.random.uniform(key) < 0.5).astype(jnp.int32)

    def step(key, state, action):
        draws = jnp.stack([jax.random.uniform(key), action.astype(jnp.float32)])
        return envs.Transition(draws, state, draws[1], jnp.bool_(False), jnp.bool_(False))

    environment = envs.Environment(
        "noisy",
        reset=lambda key: (jnp.zeros(2), ()),
        step=step,
        observation_shape=(2,),
        action_space=envs.Discrete(2),
        max_steps=400,
    )
    episode = envs.run_episode(environment, noisy, key=jax.random.key(0))
    # 400 fair coins: mean 200, standard deviation 10; repeated keys would give 0 or 400.
    assert abs(float(episode.total_reward) - 200) < 50
    # 399 uniforms (the first observation is 0): mean 199.5, standard deviation sqrt(399 / 12) = 5.8.
    assert abs(float(episode.sums.deviation[0]) - 199.5) < 29


@pytest.mark.parametrize(("normalised", "expected"), [(True, [-1.0, -0.5, 0.0, 0.5]), (False, [0.0, 1.0, 2.0, 3.0])])
def test_policy_sees_normalised_observations_and_sums_are_of_raw_ones(normalised, expected):
    statistics = envs.ObservationStatistics(jnp.float32(100), jnp.float32([2.0]), jnp.float32([400.0]))  # std 2
    seen = []

    def watch(observation, key):
        jax.debug.callback(lambda x: seen.append(float(x[0])), observation, ordered=True)
        return jnp.int32(0)

    known = {"statistics": statistics, "normalised": normalised}
    episode = envs.run_episode(counting(ends_at=4), watch, key=jax.random.key(0), **known)
    jax.effects_barrier()
    assert seen == expected
    assert jax.tree.map(lambda x: x.tolist(), episode.sums) == ObservationSums(4.0, [-2.0], [6.0])


@pytest.mark.parametrize("episodes", [0, -1, 1.5])
def test_bad_episodes(episodes):
    with pytest.raises(ValueError, match="episodes must be an integer >= 1"):
        envs.run_episodes(counting(), stay, key=jax.random.key(0), episodes=episodes)


# --- actions ------------------------------------------------------------------------------------------------------------

BOX = envs.Continuous((2,), np.float32([-2, -np.inf]), np.float32([4, np.inf]))


def test_deterministic_actions():
    assert int(envs.choose_action(envs.Discrete(3), jnp.float32([0.1, 0.3, 0.2]))) == 1
    action = envs.choose_action(BOX, jnp.float32([0.5, 7.0]))
    np.testing.assert_allclose(action, [1 + 3 * np.tanh(0.5), 7.0], rtol=1e-6)
    np.testing.assert_array_equal(envs.choose_action(BOX, jnp.float32([99.0, 0.0]))[0], 4.0)
    half = envs.Continuous((2,), np.float32([0, -np.inf]), np.float32([np.inf, 0]))
    assert envs.choose_action(half, jnp.float32([-3, -3])).tolist() == [0, -3]  # between the bounds
    sampled_head = jnp.float32([0.5, 7.0, -1.0, -1.0])
    np.testing.assert_array_equal(envs.choose_action(BOX, sampled_head), action)


def test_sampled_actions_have_the_stated_distribution():
    keys = jax.random.split(jax.random.key(0), 4000)
    logits = jnp.log(jnp.float32([0.2, 0.5, 0.3]))
    drawn = jax.vmap(lambda key: envs.choose_action(envs.Discrete(3), logits, key=key))(keys)
    counts = np.bincount(np.asarray(drawn), minlength=3)
    expected, variance = 4000 * np.array([0.2, 0.5, 0.3]), 4000 * np.array([0.16, 0.25, 0.21])
    assert (np.abs(counts - expected) < 4 * np.sqrt(variance)).all()
    assert (np.abs(counts[::-1] - expected) > 4 * np.sqrt(variance)).any()  # the wrong order is noticed
    output = jnp.float32([0.0, 3.0, 0.0, np.log(0.5)])
    values = jax.vmap(lambda key: envs.choose_action(BOX, output, key=key))(keys)[:, 1]
    assert abs(float(values.mean()) - 3.0) < 4 * 0.5 / np.sqrt(4000)
    assert abs(float(values.std()) - 0.5) < 4 * 0.5 / np.sqrt(2 * 4000)


def test_output_size():
    assert envs.output_size(envs.Discrete(3), sampled=True) == 3
    assert (envs.output_size(BOX), envs.output_size(BOX, sampled=True)) == (2, 4)
    with pytest.raises(ValueError, match=r"output must have shape \(4,\) for this action space, got \(2,\)"):
        envs.choose_action(BOX, jnp.zeros(2), key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"output must have shape \(3,\)"):
        envs.choose_action(envs.Discrete(3), jnp.zeros((1, 3)))


def test_multi_discrete_actions():
    space = envs.MultiDiscrete((3, 2))
    assert envs.output_size(space) == envs.output_size(space, sampled=True) == 5
    logits = jnp.float32([0.1, 0.3, 0.2, 5.0, 4.0])
    assert envs.choose_action(space, logits).tolist() == [1, 0]
    keys = jax.random.split(jax.random.key(0), 4000)
    logits = jnp.log(jnp.float32([0.2, 0.5, 0.3, 0.25, 0.75]))
    drawn = np.asarray(jax.vmap(lambda key: envs.choose_action(space, logits, key=key))(keys))
    joint = np.array([[(drawn == [i, j]).all(axis=1).sum() for j in range(2)] for i in range(3)])
    probability = np.outer([0.2, 0.5, 0.3], [0.25, 0.75])  # the choices are independent
    assert (np.abs(joint - 4000 * probability) < 4 * np.sqrt(4000 * probability * (1 - probability))).all()


def test_actions_per_agent_are_those_of_each_agent():
    space = envs.PerAgent(3, envs.Discrete(4))
    output = jax.random.normal(jax.random.key(0), (3, 4))
    assert envs.output_size(space) == 4
    assert envs.choose_action(space, output).tolist() == jnp.argmax(output, axis=1).tolist()
    keys = jax.random.split(jax.random.key(1), 200)
    same = jnp.zeros((3, 4))
    drawn = np.asarray(jax.vmap(lambda key: envs.choose_action(space, same, key=key))(keys))
    assert 0.1 < (drawn[:, 0] == drawn[:, 1]).mean() < 0.4  # 1/4: agents draw independently
    with pytest.raises(ValueError, match=r"output must have shape \(3, 4\) for this action space, got \(4,\)"):
        envs.choose_action(space, same[0])


def test_masked_actions_are_never_chosen():
    logits, mask = jnp.float32([9.0, 1.0, 2.0]), jnp.array([False, True, True])
    assert int(envs.choose_action(envs.Discrete(3), logits)) == 0
    assert int(envs.choose_action(envs.Discrete(3), logits, mask=mask)) == 2
    keys = jax.random.split(jax.random.key(0), 500)
    drawn = np.asarray(jax.vmap(lambda key: envs.choose_action(envs.Discrete(3), logits, key=key, mask=mask))(keys))
    assert set(drawn.tolist()) == {1, 2}
    parts = envs.choose_action(envs.MultiDiscrete((2, 3)), jnp.float32([1, 0, 9, 1, 2]), mask=jnp.array([0, 1, 0, 1, 1], bool))
    assert parts.tolist() == [1, 2]
    agents = envs.choose_action(
        envs.PerAgent(2, envs.Discrete(3)), jnp.stack([logits, logits]), mask=jnp.stack([mask, jnp.ones(3, bool)])
    )
    assert agents.tolist() == [2, 0]
    assert int(envs.choose_action(envs.Discrete(3), logits, mask=jnp.zeros(3, bool))) == 0  # all forbidden: ignored


def test_bad_masks():
    with pytest.raises(ValueError, match=r"mask must have the shape \(3,\) of the logits, got \(2,\)"):
        envs.choose_action(envs.Discrete(3), jnp.zeros(3), mask=jnp.ones(2, bool))
    with pytest.raises(ValueError, match="mask must be None for continuous actions"):
        envs.choose_action(BOX, jnp.zeros(2), mask=jnp.ones(2, bool))


# --- policies -----------------------------------------------------------------------------------------------------------


def matching(*, agents=None, masked=False):
    """Three steps; the reward of a step counts the agents whose action is 2, or 1 where 2 is forbidden."""
    lead = () if agents is None else (agents,)
    space = envs.Discrete(3) if agents is None else envs.PerAgent(agents, envs.Discrete(3))
    wanted = 1 if masked else 2

    def observe(t):
        return jnp.broadcast_to(t.astype(jnp.float32), (*lead, 2, 2))

    def step(key, t, action):
        assert action.shape == lead
        reward = (action == wanted).astype(jnp.float32).sum()
        return envs.Transition(observe(t + 1), t + 1, reward, t + 1 >= 3, jnp.bool_(False))

    return envs.Environment(
        "matching",
        reset=lambda key: (observe(jnp.int32(0)), jnp.int32(0)),
        step=step,
        observation_shape=(*lead, 2, 2),
        action_space=space,
        max_steps=3,
        action_mask=(lambda state: jnp.broadcast_to(jnp.array([True, True, False]), (*lead, 3))) if masked else None,
    )


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("agents", [None, 2])
def test_network_policy(agents, masked, sampled):
    environment = matching(agents=agents, masked=masked)
    assert envs.input_size(environment) == 4

    def network(features):
        assert features.shape == (4,)
        return jnp.float32([0.0, 200.0, 400.0])

    policy = envs.network_policy(environment, network, sampled=sampled)
    episode = envs.run_episode(environment, policy, key=jax.random.key(0))
    assert float(episode.total_reward) == 3 * (agents or 1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("agents", [None, 2])
def test_recurrent_policy_remembers(agents, masked):
    """It counts its steps and acts right from the second on; every episode begins with the given memory."""
    environment = matching(agents=agents, masked=masked)

    def network(memory, features):
        return memory + 1, jnp.where(memory >= 1, jnp.float32([0, 1, 2]), jnp.float32([9, 1, 2]))

    policy = envs.network_policy(environment, network, recurrent=True)
    memory = jnp.zeros(() if agents is None else (agents,), jnp.int32)
    run = jax.jit(lambda key, memory: envs.run_episodes(environment, policy, key=key, episodes=2, memory=memory))
    assert run(jax.random.key(0), memory).total_reward.tolist() == [2.0 * (agents or 1)] * 2
    assert run(jax.random.key(0), memory + 1).total_reward.tolist() == [3.0 * (agents or 1)] * 2


def test_memory_of_a_rollout_does_not_grow_with_its_length():
    def temporary_bytes(max_steps):
        run = jax.jit(lambda key: envs.run_episodes(counting(max_steps=max_steps), stay, key=key, episodes=64))
        return run.lower(jax.random.key(0)).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(100_000) <= temporary_bytes(10)


# --- normalisation ------------------------------------------------------------------------------------------------------


def gather(observations, statistics):
    sums = initial_sums(observations.shape[1:])
    add = jax.jit(lambda sums, x: (add_observation(sums, x, centre=statistics.mean), None))
    return jax.lax.scan(add, sums, observations)[0]


def test_statistics_of_generations_equal_those_of_all_observations():
    rng = np.random.default_rng(0)
    generations = [rng.normal(3.0, [1.0, 20.0], (n, 2)).astype(np.float32) for n in (5, 1, 300, 40)]
    statistics = envs.initial_statistics((2,))
    for observations in generations:
        first, second = jnp.asarray(observations[::2]), jnp.asarray(observations[1::2])  # two members
        sums = jax.tree.map(jnp.add, gather(first, statistics), gather(second, statistics))
        statistics = envs.merge(statistics, sums)
    everything = np.concatenate(generations).astype(np.float64)
    assert float(statistics.number) == len(everything)
    np.testing.assert_allclose(statistics.mean, everything.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(statistics.m2, everything.var(axis=0) * len(everything), rtol=1e-5)
    normalised = envs.normalise(statistics, jnp.asarray(everything[7], jnp.float32))
    np.testing.assert_allclose(normalised, (everything[7] - everything.mean(axis=0)) / everything.std(axis=0), rtol=1e-4)


def test_an_offset_does_not_cost_precision():
    """Around the known mean the variance survives an offset of 10,000 standard deviations; around zero it does not."""
    rng = np.random.default_rng(1)
    observations = jnp.asarray(rng.normal(1e4, 1.0, (2000, 1)), jnp.float32)
    exact = np.asarray(observations, np.float64).var()
    known = envs.ObservationStatistics(jnp.float32(1), jnp.float32([1e4]), jnp.float32([0.0]))
    merged = envs.merge(known, gather(observations, known))
    assert abs(float(merged.m2[0] / merged.number) / exact - 1) < 1e-3
    unknown = envs.initial_statistics((1,))
    naive = envs.merge(unknown, gather(observations, unknown))
    assert abs(float(naive.m2[0] / naive.number) / exact - 1) > 1e-3


def test_sums_that_overflow_leave_the_statistics_as_they_are():
    known = envs.ObservationStatistics(jnp.float32(9), jnp.float32([0.5, 1.0]), jnp.ones(2))
    observations = jnp.float32([[0.0, 1.5e19], [0.0, -1.5e19]])  # their squares are finite, the sum of them is not
    jax.tree.map(np.testing.assert_array_equal, envs.merge(known, gather(observations, known)), known)


def test_normalise_without_observations_or_variation():
    observation = jnp.float32([0.5, -50.0])
    nothing = envs.initial_statistics((2,))
    np.testing.assert_array_equal(envs.normalise(nothing, observation), [0.5, -10.0])
    jax.tree.map(np.testing.assert_array_equal, envs.merge(nothing, initial_sums((2,))), nothing)
    constant = envs.ObservationStatistics(jnp.float32(9), jnp.float32([0.5, 0.0]), jnp.zeros(2))
    np.testing.assert_array_equal(envs.normalise(constant, observation), [0.0, -10.0])


# --- gymnax -------------------------------------------------------------------------------------------------------------


def test_cartpole_is_gymnax_cartpole(standard_promotion):
    import gymnax

    ours, (theirs, params) = envs.make("CartPole-v1"), gymnax.make("CartPole-v1")
    assert (ours.observation_shape, ours.action_space, ours.max_steps) == ((4,), envs.Discrete(2), 500)
    key = jax.random.key(5)
    observation, state = ours.reset(key)
    expected, their_state = theirs.reset(key, params)
    step = jax.jit(ours.step)
    for i in range(60):
        np.testing.assert_allclose(observation, expected, rtol=1e-5)
        action = jnp.int32(i % 3 == 0)
        observation, state, reward, terminated, truncated = step(key, state, action)
        expected, their_state, their_reward, their_terminated, _, info = theirs.step(key, their_state, action, params)
        assert (float(reward), bool(terminated)) == (float(their_reward), bool(their_terminated))
        if terminated:
            np.testing.assert_allclose(observation, info["final_observation"], rtol=1e-5)
            break
    assert terminated and not truncated


def test_cartpole_is_truncated_at_500_steps():
    """A controller that keeps the pole up gets the highest return, 500."""
    environment = envs.make("CartPole-v1")

    def controller(observation, key):
        return (observation @ jnp.float32([0.1, 0.4, 1.0, 0.6]) > 0).astype(jnp.int32)

    run = jax.jit(lambda key: envs.run_episodes(environment, controller, key=key, episodes=5))
    episodes = run(jax.random.key(0))
    assert episodes.total_reward.tolist() == [500.0] * 5 and episodes.steps.tolist() == [500] * 5


@pytest.mark.parametrize("name", [name for name in names() if name != "MNISTBandit-bsuite"])  # that one downloads data
def test_every_gymnax_environment_runs(name):
    environment = envs.make(name)
    space = environment.action_space

    def policy(observation, key):
        assert observation.shape == environment.observation_shape and observation.dtype == jnp.float32
        return envs.choose_action(space, jnp.zeros(envs.output_size(space, sampled=True)), key=key)

    statistics = envs.initial_statistics(environment.observation_shape)
    run = jax.eval_shape(lambda key: envs.run_episode(environment, policy, key=key, statistics=statistics), jax.random.key(0))
    assert run.total_reward.shape == () and run.total_reward.dtype == jnp.float32
    assert run.sums.deviation.shape == environment.observation_shape


class Stepping:
    """A gymnax-like environment that has `step` only: the task ends at 3, the time is up at 5."""

    def __init__(self, *, values, terminates=True):
        self.values, self.terminates = values, terminates

    def reset(self, key, params):
        return jnp.zeros(2), {"t": 0}

    def step(self, key, state, action, params):
        t = state["t"] + 1
        terminated, truncated = (t >= 3) & self.terminates, t >= 5
        ends = (terminated, truncated) if self.values == 6 else (terminated | truncated,)
        return jnp.full(2, t, jnp.float32), {"t": t}, 2, *ends, {}

    def action_space(self, params):
        return SimpleNamespace(low=-1.0, high=1.0, shape=(2,))


class OldStepping(Stepping):
    """One that has `step_env` too, with the time limit in its fourth value, as gymnax 0.0 had."""

    def step_env(self, key, state, action, params):
        return Stepping.step(self, key, state, action, params)

    def step(self, key, state, action, params):
        raise AssertionError("step resets finished episodes")


@pytest.mark.parametrize(("make", "values"), [(Stepping, 5), (Stepping, 6), (OldStepping, 5)])
@pytest.mark.parametrize(("terminates", "length"), [(True, 3), (False, 5)])
def test_both_gymnax_signatures(make, values, terminates, length):
    environment = adapt(make(values=values, terminates=terminates), SimpleNamespace(max_steps_in_episode=50), name="fake")
    assert environment.action_space.low.tolist() == [-1.0, -1.0]
    policy = jax.jit(lambda observation, key: jnp.zeros(2))
    episode = envs.run_episode(environment, policy, key=jax.random.key(0))
    assert (float(episode.total_reward), int(episode.steps)) == (2.0 * length, length)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cartpole-v1", "env must name an environment, got 'cartpole-v1'; did you mean CartPole-v1"),
        ("Penduluum", "did you mean Pendulum-v1"),
        ("xyzzy", "known are CartPole-v1, Pendulum-v1"),
        ("", "got ''; known are"),
        ("ant", "did you mean brax/ant"),
        ("brx/Ant", "did you mean brax/ant"),
        ("snake", "did you mean jumanji/Snake-v1"),
        ("hopper", "did you mean brax/hopper"),
    ],
)
def test_unknown_names_suggest_near_ones(name, words):
    with pytest.raises(ValueError, match=words):
        envs.make(name)


# --- names --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_registrations(monkeypatch):
    monkeypatch.setattr("eggroll.envs.registry._registered", {})


def test_users_register_their_own(no_registrations):
    factory = counting
    envs.register("mine/Counting-v0", factory)
    envs.register("mine/Counting-v0", factory)  # running a notebook cell again is no error
    assert envs.make("mine/Counting-v0").max_steps == 20
    assert envs.run_episode(envs.make("mine/Counting-v0", max_steps=1), stay, key=jax.random.key(0)).steps == 1
    with pytest.raises(ValueError, match="did you mean mine/Counting-v0"):
        envs.make("mine/counting")
    with pytest.raises(ValueError, match="name must be a new, non-empty name, got 'mine/Counting-v0'"):
        envs.register("mine/Counting-v0", lambda: counting())
    with pytest.raises(ValueError, match="name must be a new, non-empty name, got ''"):
        envs.register("", factory)
    with pytest.raises(TypeError, match="factory must be a function that returns an Environment, got Environment"):
        envs.register("other", counting())


@pytest.mark.parametrize(("suite", "name"), [(suite, f"{suite}/{row.examples[0]}") for suite, row in SUITES.items()])
def test_a_missing_suite_says_how_to_install_it(suite, name, monkeypatch):
    monkeypatch.setitem(sys.modules, SUITES[suite].package, None)
    words = f"needs the module {SUITES[suite].package}, which is not installed; {SUITES[suite].install} installs it."
    with pytest.raises(ModuleNotFoundError, match=re.escape(words)):
        envs.make(name.removeprefix("gymnax/"))
    with pytest.raises(ModuleNotFoundError, match=re.escape(words)):
        envs.names(suite)


def test_a_module_missing_when_an_environment_is_made_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("eggroll.envs.suites.gymnax.make", lambda name: importlib.import_module("no_such_module"))
    words = "env 'CartPole-v1' needs the module no_such_module, which is not installed; pip install gymnax six installs it."
    with pytest.raises(ModuleNotFoundError, match=re.escape(words)):
        envs.make("CartPole-v1")


@pytest.mark.filterwarnings("ignore")  # the suites' own
@pytest.mark.parametrize(
    "suite", [suite if suite == "gymnax" else pytest.param(suite, marks=pytest.mark.slow) for suite in SUITES]
)
def test_an_installed_suite_suggests_its_own_names(suite):
    if not envs.is_installed(suite):
        pytest.skip(f"needs {suite}: {SUITES[suite].install}")
    name = envs.names(suite)[-1]
    with pytest.raises(ValueError, match=re.escape(f"env must name an environment, got '{name}x'; did you mean {name}")):
        envs.make(f"{name}x")


def test_old_clip_keywords_are_allowed_in_one_module_alone():
    module = SimpleNamespace(jnp=jnp)
    allow_old_clip(module, "jnp")
    x = jnp.float32([-3, 0, 3])
    assert module.jnp.clip(x, a_min=-1, a_max=2).tolist() == module.jnp.clip(x, -1, max=2).tolist() == [-1, 0, 2]
    assert module.jnp.tanh is jnp.tanh
    with pytest.raises(TypeError, match="a_min"):
        jnp.clip(x, a_min=-1)


@pytest.mark.parametrize(
    ("name", "expected"), [("ant", ("ant", "slow")), ("ant@fast", ("ant", "fast")), ("s/h1@slow", ("s/h1", "slow"))]
)
def test_variants(name, expected):
    assert split_variant(name, ("slow", "fast"), suite="x") == expected


def test_unknown_variants():
    with pytest.raises(ValueError, match="env 'x/ant@fats' must have one of the variants @slow, @fast, got '@fats'"):
        split_variant("ant@fats", ("slow", "fast"), suite="x")


def test_importing_envs_imports_no_suite():
    packages = {row.package for row in SUITES.values()}
    code = f"import sys, envs; assert not {packages} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_structured_spaces_are_refused():
    fake = Stepping(values=6)
    params = SimpleNamespace(max_steps_in_episode=5)
    fake.action_space = lambda params: SimpleNamespace(spaces=())
    with pytest.raises(ValueError, match="env 'fake' has a SimpleNamespace action space"):
        adapt(fake, params, name="fake")
    fake.reset = lambda key, params: ({"a": jnp.zeros(2)}, {"t": 0})
    with pytest.raises(ValueError, match="env 'fake' has observations of type dict, expected a single array"):
        adapt(fake, params, name="fake")


def test_a_time_limit_that_cannot_take_effect_is_refused():
    assert envs.with_time_limit(counting(max_steps=20), 20).max_steps == 20
    with pytest.raises(ValueError, match="max_steps must be at most 20, where 'counting' ends its episodes, got 21"):
        envs.with_time_limit(counting(max_steps=20), 21)
    with pytest.raises(ValueError, match="max_steps must be at most 500, where 'CartPole-v1' ends its episodes, got 1000"):
        envs.make("CartPole-v1", max_steps=1000)
