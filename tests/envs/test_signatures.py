"""An environment or a policy of the user's that does not fit is told what was found and what is expected."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eggroll import envs
from eggroll.envs import registry
from eggroll.files import read_object

ZERO, FALSE = jnp.float32(0), jnp.bool_(False)


def reset(key):
    return jnp.zeros(2), {"t": jnp.int32(0), "x": jnp.zeros(3)}


def step(key, state, action):
    return envs.Transition(jnp.zeros(2), state | {"t": state["t"] + 1}, ZERO, state["t"] >= 3, FALSE)


RIGHT = envs.Environment(
    "mine", reset=reset, step=step, observation_shape=(2,), action_space=envs.Discrete(2), max_steps=5, draw=None
)


def stay(observation, key):
    return jnp.int32(0)


def changed(**fields):
    """A step with other fields in its result."""
    return {"step": lambda key, state, action: step(key, state, action)._replace(**fields)}


def of_state(change):
    return {"step": lambda key, state, action: step(key, state, action)._replace(state=change(state))}


RETURNS = "step must return an envs.Transition(observation, state, reward, terminated, truncated)"
CALLS = [
    ({"reset": lambda: None}, "env 'mine': reset is called as reset(key), but <lambda>() takes fewer arguments."),
    (
        {"step": lambda state, action: None},
        "env 'mine': step is called as step(key, state, action), but <lambda>(state, action) takes fewer arguments.",
    ),
    (
        {"step": lambda key, state, action, params: None},
        "env 'mine': step is called as step(key, state, action), but <lambda>(key, state, action, params) is missing a "
        "required argument: 'params'.",
    ),
    ({"action_mask": lambda: None}, "env 'mine': action_mask is called as action_mask(state), but <lambda>() takes fewer"),
    ({"draw": lambda state, path: None}, "env 'mine': draw is called as draw(state), but <lambda>(state, path) is missing a"),
    ({"reset": None}, "env 'mine': reset must be a function, got NoneType."),
]
RESULTS = [
    ({"reset": lambda key: jnp.zeros(2)}, "env 'mine': reset must return (observation, state), got float32[2]."),
    (
        {"step": lambda key, state, action: (jnp.zeros(2), ZERO, FALSE, {})},
        f"env 'mine': {RETURNS}, got a tuple of 4 values (float32[2], float32[], bool[], a dict). One flag `done` becomes two:",
    ),
    (
        {"step": lambda key, state, action: (jnp.zeros(2), ZERO, FALSE, FALSE, {})},
        f"env 'mine': {RETURNS}, got a tuple of 5 values (float32[2], float32[], bool[], bool[], a dict).",
    ),
    (changed(observation=jnp.zeros(3)), "env 'mine' must give observations of its observation_shape (2,), got (3,)."),
    (changed(observation=jnp.zeros(2, jnp.uint8)), "env 'mine' must give observations of dtype float32, got uint8 from step;"),
    ({"reset": lambda key: (jnp.zeros(2, jnp.int32), 0)}, "env 'mine' must give observations of dtype float32, got int32 from"),
    (
        {"reset": lambda key: ({"near": jnp.zeros(2)}, 0)},
        "env 'mine': reset must return the observation as one float32 array [2], got a dict; join its parts: ",
    ),
    (
        changed(observation={"near": jnp.zeros(2)}),
        "env 'mine': step must return the observation as one float32 array [2], got a",
    ),
    (
        changed(reward=jnp.zeros(1)),
        "env 'mine': reward must be a float32 scalar, got float32[1]. Convert it: reward.squeeze().",
    ),
    (changed(reward=jnp.zeros(3)), "env 'mine': reward must be a float32 scalar, got float32[3]."),
    (changed(reward={}), "env 'mine': reward must be a float32 scalar, got a dict."),
    (
        changed(terminated=jnp.float32(0)),
        "env 'mine': terminated must be a bool scalar, got float32[]. Convert it: terminated.squeeze().astype(bool).",
    ),
    (changed(truncated=jnp.zeros(2, bool)), "env 'mine': truncated must be a bool scalar, got bool[2]."),
    (
        of_state(lambda state: state | {"t": jnp.float32(1)}),
        "env 'mine': step must return the state as reset makes it: ['t'] is int32[], got float32[].",
    ),
    (
        of_state(lambda state: state | {"x": jnp.zeros(4)}),
        "env 'mine': step must return the state as reset makes it: ['x'] is float32[3], got float32[4].",
    ),
    (
        of_state(lambda state: (state, 1)),
        "env 'mine': step must return the state as reset makes it, PyTreeDef({'t': *, 'x': *}), got "
        "PyTreeDef(({'t': *, 'x': *}, *)).",
    ),
    ({"action_mask": lambda state: jnp.ones(3, bool)}, "env 'mine': action_mask must return bool[2], got bool[3]."),
    ({"action_mask": lambda state: jnp.ones(2)}, "env 'mine': action_mask must return bool[2], got float32[2]."),
]


@pytest.mark.parametrize(("fields", "words"), CALLS)
def test_a_function_with_other_arguments(fields, words):
    with pytest.raises(TypeError, match=re.escape(words)):
        envs.run_episode(dataclasses.replace(RIGHT, **fields), stay, key=jax.random.key(0))


@pytest.mark.parametrize(("fields", "words"), RESULTS)
def test_another_result(fields, words):
    wrong = dataclasses.replace(RIGHT, **fields)
    with pytest.raises(ValueError, match=re.escape(words)):
        envs.run_episodes(wrong, stay, key=jax.random.key(0), episodes=2)
    with pytest.raises(ValueError, match=re.escape(words)):  # a wrong one is not remembered as checked
        envs.run_episode(wrong, stay, key=jax.random.key(0))


DECLARED = [
    ({"observation_shape": 2}, "env 'mine': observation_shape must be a tuple of integers, such as (4,), got 2."),
    (
        {"action_space": 2},
        "env 'mine': action_space must be one of envs.Discrete, envs.Continuous, envs.MultiDiscrete, ",
    ),
    (
        {"action_space": envs.Continuous((2,), np.float32(-1), np.ones(2, np.float32))},
        "env 'mine': the bounds of continuous actions must be arrays of their shape (2,), got () and (2,).",
    ),
    (
        {"action_space": envs.Continuous((1,), np.ones(1, np.float32), np.zeros(1, np.float32))},
        "env 'mine': low must be at most high in every axis of action_space, got [1.] and [0.].",
    ),
    (
        {"action_space": envs.Continuous((1,), np.full(1, np.nan), np.ones(1))},
        "env 'mine': low must be at most high in every axis of action_space, got [nan] and [1.].",
    ),
    ({"action_space": envs.Discrete(0)}, "env 'mine': n of action_space must be an integer >= 1, got 0."),
    ({"action_space": envs.Discrete(2.0)}, "env 'mine': n of action_space must be an integer >= 1, got 2.0."),
    ({"action_space": envs.MultiDiscrete(())}, "env 'mine': sizes of action_space must be integers >= 1, got ()."),
    (
        {"action_space": envs.PerAgent(3, envs.Discrete(2))},
        "env 'mine': observation_shape must begin with its 3 agents, got (2,).",
    ),
]


@pytest.mark.parametrize(("fields", "words"), DECLARED)
def test_another_declaration(fields, words):
    with pytest.raises((TypeError, ValueError), match=re.escape(words)):
        envs.check_environment(dataclasses.replace(RIGHT, **fields))


def branching(key, state, action):
    return step(key, state, action)._replace(reward=ZERO if state["t"] > 1 else 1 + ZERO)


def in_numpy(key, state, action):
    return step(key, state, action)._replace(reward=jnp.float32(np.sin(state["x"]).sum()))


@pytest.mark.parametrize("wrong", [branching, in_numpy])
def test_a_step_that_is_not_a_jax_function(wrong):
    words = "env 'mine': step must be a pure JAX function, but it needs the value of an array while it is traced (Tracer"
    with pytest.raises(TypeError, match=re.escape(words)):
        envs.check_environment(dataclasses.replace(RIGHT, step=wrong))


def test_an_error_of_the_author_is_told_with_environment_function_and_line(monkeypatch):
    def step(key, state, action):
        return jnp.zeros(3) + jnp.zeros(4)

    line = step.__code__.co_firstlineno + 1
    with pytest.raises(
        ValueError, match=rf"^env 'mine': step raised TypeError: .*\(test_signatures\.py, line {line}\)$"
    ) as caught:
        envs.check_environment(dataclasses.replace(RIGHT, step=step))
    assert isinstance(caught.value.__cause__, TypeError)

    def reset(key):
        return read_object(Path("missing"))  # the author's line counts, not that of the library

    with pytest.raises(ValueError, match=r"reset raised FileNotFoundError: .*\(test_signatures\.py, line \d+\)$"):
        envs.check_environment(dataclasses.replace(RIGHT, reset=reset))
    monkeypatch.setattr(registry, "_registered", {})
    envs.register("broken", lambda: {}["size"])
    with pytest.raises(
        ValueError, match=r"^env 'broken': its factory raised KeyError: 'size' \(test_signatures\.py, line \d+\)$"
    ):
        envs.make("broken")


def test_one_that_fits():
    assert envs.check_environment(dataclasses.replace(RIGHT, max_steps=np.array(5))) is None
    for sizes in (np.array([2, 3]), [2, 3], (np.int64(2), 3)):
        envs.check_environment(dataclasses.replace(RIGHT, action_space=envs.MultiDiscrete(sizes)))
    traced = lambda low: envs.check_environment(  # noqa: E731
        dataclasses.replace(RIGHT, action_space=envs.Continuous((1,), low, np.ones(1)))
    )
    jax.eval_shape(traced, jnp.zeros(1))  # its bounds are not known yet


POLICIES = [
    (lambda observation: 0, None, "policy is called as policy(observation, key), but <lambda>(observation) takes fewer"),
    (lambda memory, observation, key: 0, None, "policy is called as policy(observation, key), but <lambda>(memory, obs"),
    (stay, ZERO, "policy is called as policy(memory, observation, key), but stay(observation, key) takes fewer arguments."),
    (lambda memory, observation, key: jnp.int32(0), ZERO, "policy has a memory and must return (memory, action), got int32[]."),
    (
        lambda memory, observation, key: (memory[None], jnp.int32(0)),
        ZERO,
        "policy must return its memory as it came: it is float32[], got float32[1].",
    ),
]


@pytest.mark.parametrize(("policy", "memory", "words"), POLICIES)
def test_policies_that_do_not_fit(policy, memory, words):
    with pytest.raises((TypeError, ValueError), match=re.escape(words)):
        envs.run_episode(RIGHT, policy, key=jax.random.key(0), memory=memory)


def test_a_policy_without_the_mask():
    masked = dataclasses.replace(RIGHT, action_mask=lambda state: jnp.ones(2, bool))
    with pytest.raises(TypeError, match=re.escape("policy is called as policy(observation, key, mask), but stay(")):
        envs.run_episode(masked, stay, key=jax.random.key(0))


def test_registered_environments_are_checked_when_they_are_made(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    envs.register("returns nothing", lambda: None)
    with pytest.raises(TypeError, match=r"the factory of 'returns nothing' must return .*Environment, got NoneType"):
        envs.make("returns nothing")
    wrong = dataclasses.replace(RIGHT, reset=lambda key: jnp.zeros(2))
    envs.register("wrong reset", lambda: wrong)
    with pytest.raises(ValueError, match="reset must return"):
        envs.make("wrong reset")


def test_what_is_not_an_environment():
    with pytest.raises(TypeError, match=r"environment must be an envs\.Environment, got str"):
        envs.run_episode("CartPole-v1", stay, key=jax.random.key(0))


def test_an_environment_that_fits_is_traced_once_more_in_all():
    traces = []

    def counted(key):
        traces.append(1)
        return reset(key)

    environment = dataclasses.replace(RIGHT, reset=counted)
    for _ in range(3):
        assert envs.run_episode(environment, stay, key=jax.random.key(0)).steps == 4
    assert len(traces) == 1 + 3


def test_python_numbers_and_whole_rewards_fit():
    """They did before there was a check."""

    def loose(key, state, action):
        return envs.Transition(jnp.zeros(2), state + 1, jnp.int32(2), state >= 3, False)

    environment = dataclasses.replace(RIGHT, reset=lambda key: (jnp.zeros(2), 0), step=loose)
    episode = envs.run_episode(environment, stay, key=jax.random.key(0))
    assert (float(episode.total_reward), int(episode.steps)) == (8.0, 4)
