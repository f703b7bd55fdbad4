"""Copies of a NumPy environment stepped together: returns, seeds, memory, what is refused, pickling."""

import functools
import pickle
import re

import jax.numpy as jnp
import numpy as np
import pytest

from eggroll import envs
from eggroll.envs import registry

LOW, HIGH = np.float32([-1, -2]), np.float32([1, 2])


class Box:
    dtype = np.dtype(np.float64)

    def __init__(self, shape=(2,)):
        self.shape, self.low, self.high = shape, np.broadcast_to(LOW, shape), np.broadcast_to(HIGH, shape)


class Discrete:
    def __init__(self, n, start=0):
        self.n, self.start = n, start


class MultiDiscrete:
    def __init__(self, *sizes):
        self.nvec, self.shape = np.array(sizes), (len(sizes),)


class Dict:
    pass


class Counting:
    """Ends after `seed` + 1 steps; the reward is the action, the observation [seed, steps]."""

    result = None

    def __init__(self, action_space=None, observation_space=None):
        self.action_space, self.observation_space = action_space or Discrete(5), observation_space or Box()

    def reset(self, *, seed):
        self.seed, self.steps, self.actions = seed, 0, []
        return np.float64([seed, 0]), {}

    def step(self, action):
        self.steps += 1
        self.actions.append(action)
        if self.result is not None:
            return self.result
        return np.float64([self.seed, self.steps]), float(np.sum(action)), self.steps > self.seed, False, {}

    def close(self):
        self.closed = True


def test_every_copy_plays_its_own_episode_and_acts_no_more_after_its_end():
    made = []

    def make():
        made.append(Counting())
        return made[-1]

    simulator, seen = envs.Simulator(make, copies=3), []

    def policy(observations):
        seen.append(observations)
        return jnp.int32([1, 2, 3])

    played = simulator.play(policy, seeds=[0, 3, 1])
    assert played.total_reward.tolist() == [1, 8, 6] and played.steps.tolist() == [1, 4, 2]
    assert [len(env.actions) for env in made] == [1, 4, 2] and type(made[0].actions[0]) is int
    assert [x.tolist() for x in seen[:2]] == [[[0, 0], [3, 0], [1, 0]], [[0, 1], [3, 1], [1, 1]]]
    assert seen[-1].tolist() == [[0, 1], [3, 3], [1, 2]] and seen[0].dtype == np.float32
    assert simulator.play(policy, seeds=[0, 0, 0]).total_reward.tolist() == [1, 2, 3]
    simulator.close()
    assert all(env.closed for env in made)


def test_a_policy_with_a_memory():
    played = envs.Simulator(Counting, copies=2).play(
        lambda memory, seen: (memory + 1, memory), seeds=[2, 3], memory=np.zeros(2, int)
    )
    assert played.total_reward.tolist() == [0 + 1 + 2, 0 + 1 + 2 + 3]


@pytest.mark.parametrize(
    ("native", "action", "expected", "space"),
    [
        (Discrete(3, start=7), np.int32(2), 9, envs.Discrete(3)),
        (MultiDiscrete(2, 3), np.int32([1, 2]), [1, 2], envs.MultiDiscrete((2, 3))),
        (Box(), np.float32([0.5, -1]), [0.5, -1], envs.Continuous((2,), LOW, HIGH)),
    ],
)
def test_actions_are_given_as_the_environment_takes_them(native, action, expected, space):
    env = Counting(native)
    simulator = envs.Simulator(lambda: env, copies=1)
    simulator.play(lambda observations: action[None], seeds=[0])
    np.testing.assert_array_equal(env.actions, [expected])
    found = simulator.action_space
    assert type(found) is type(space)
    assert envs.output_size(found) == envs.output_size(space)
    if isinstance(native, Box):
        assert env.actions[0].dtype == np.float64 and (found.low == LOW).all() and (found.high == HIGH).all()


@pytest.mark.parametrize(("reward", "first"), [(np.nan, 0), (1.0, np.inf)])
def test_what_is_not_finite_ends_the_episode_with_nan(reward, first, monkeypatch):
    monkeypatch.setattr(Counting, "result", (np.float64([first, 0]), reward, False, False, {}))
    played = envs.Simulator(Counting, copies=1).play(lambda observations: np.int32([0]), seeds=[5])
    assert np.isnan(played.total_reward[0]) and played.steps[0] == 1


def test_a_pickle_makes_its_own_copies():
    simulator = pickle.loads(pickle.dumps(envs.Simulator(Counting, copies=2)))
    assert simulator.play(lambda observations: np.int32([1, 1]), seeds=[0, 1]).total_reward.tolist() == [1, 2]


SEEN = np.zeros(2)
RESULTS = [
    ((SEEN, 0.0, False, {}), "env 'Counting': step must return (observation, reward, terminated, truncated, info), as in"),
    ((SEEN, 0.0, False, {}), "got 4 values. One flag `done` becomes two: terminated where the task ended, truncated where"),
    (SEEN, "as in gymnasium, got ndarray."),
    ((SEEN, np.zeros(1), False, False, {}), "env 'Counting': reward must be a number, got an array of shape (1,)."),
    ((SEEN, 0.0, 0.0, False, {}), "env 'Counting': terminated must be a bool, got float."),
    ((np.zeros(3), 0.0, False, False, {}), "env 'Counting' must give observations of its observation_space, (2,), got (3,)."),
    (({"a": SEEN}, 0.0, False, False, {}), "env 'Counting' must give observations of its observation_space, (2,), got ()."),
]


@pytest.mark.parametrize(("result", "words"), RESULTS)
def test_wrong_results(result, words, monkeypatch):
    monkeypatch.setattr(Counting, "result", result)
    with pytest.raises(ValueError, match=re.escape(words)):
        envs.Simulator(Counting, copies=1).play(lambda observations: np.int32([0]), seeds=[5])


WRONG = [
    (lambda: envs.Simulator(Counting, copies=0), "copies must be an integer >= 1, got 0."),
    (
        lambda: envs.Simulator(3, copies=1),
        "make must be a name of gymnasium or a function that returns an environment, got",
    ),
    (
        lambda: envs.Simulator(dict, copies=1),
        "make must return an environment of gymnasium's interface, got dict without",
    ),
    (
        lambda: envs.Simulator(lambda: Counting(observation_space=Dict()), copies=1),
        "env 'Counting' has observations of the space Dict, expected a Box, one array; gymnasium.wrappers.Flatten",
    ),
    (
        lambda: envs.Simulator(lambda: Counting(Dict()), copies=1),
        "env 'Counting' has actions of the space Dict, expected",
    ),
    (
        lambda: envs.Simulator(Counting, copies=2).play(None, seeds=[1]),
        "seeds must have shape (2,), one for each copy, got (1",
    ),
    (
        lambda: envs.Simulator(Counting, copies=2).play(lambda seen: np.int32(0), seeds=[1, 2]),
        "policy must return integers [2] for env 'Counting', as choose_action does, got int32[].",
    ),
    (
        lambda: envs.Simulator(Counting, copies=2).play(lambda seen: np.float32([0.7, 1.9]), seeds=[1, 2]),
        "policy must return integers [2] for env 'Counting', as choose_action does, got float32[2].",
    ),
    (
        lambda: envs.Simulator(Counting, copies=2).play(lambda seen: np.zeros((2, 5), np.int32), seeds=[1, 2]),
        "policy must return integers [2] for env 'Counting', as choose_action does, got int32[2, 5].",
    ),
    (
        lambda: envs.Simulator(lambda: Counting(Box()), copies=1).play(lambda seen: np.zeros((1, 3)), seeds=[1]),
        "policy must return numbers [1, 2] for env 'Counting', as choose_action does, got float64[1, 3].",
    ),
    (
        lambda: envs.Simulator(functools.cache(Counting), copies=3),
        "make must return another environment at every call, got one twice.",
    ),
    (lambda: envs.make("gymnasium/CartPole-v1"), "env 'gymnasium/CartPole-v1' is not a JAX function: envs.Simulator plays"),
]


@pytest.mark.parametrize(("call", "words"), WRONG)
def test_what_is_refused(call, words):
    with pytest.raises((ValueError, TypeError), match=re.escape(words)):
        call()


def test_an_environment_of_gymnasium_that_is_registered(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    envs.register("theirs", Counting)
    with pytest.raises(TypeError, match=r"got Counting; envs\.Simulator plays an environment of gymnasium"):
        envs.make("theirs")
