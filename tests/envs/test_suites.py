"""Conformance of every adapter: one table of environments, the same properties for all; a new adapter is one row.

A hand-written loop records every step of a few short episodes under a random policy; the properties are read from the record.
The suites beyond gymnax are slow; one that is not installed is skipped, with the command that installs it.
"""

import functools
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eggroll import envs
from eggroll.envs.registry import SUITES

pytestmark = pytest.mark.filterwarnings("ignore")  # the suites' own
EPISODES, STEPS = 6, 40

NAMES = [
    *["CartPole-v1", "Pendulum-v1"],
    *["jumanji/Snake-v1", "jumanji/Game2048-v1", "jumanji/Knapsack-v1", "jumanji/Minesweeper-v0", "jumanji/RubiksCube-v0"],
    *["navix/DoorKey-8x8-v0", "navix/Navix-Dynamic-Obstacles-6x6-Random-v0", "navix/FourRooms-v0"],
    *["mpe/simple_spread_v3", "mpe/simple_speaker_listener_v4", "mpe/simple_reference_v3"],
    *["brax/inverted_double_pendulum", "brax/ant", "brax/humanoid@spring"],
    *["craftax/Craftax-Classic-Symbolic-v1", "craftax/Craftax-Symbolic-AutoReset-v1"],
    *["kinetix/s/h1_thrust_over_ball", "kinetix/m/h17_thrustcontrol_left", "kinetix/l/hard_pinball"],
    "kinetix/s/h1_thrust_over_ball@continuous",
]


def case(name, *more):
    """A row of the table, skipped where its suite is not installed."""
    suite = name.split("/")[0] if "/" in name else "gymnax"
    skip = pytest.mark.skipif(not envs.is_installed(suite), reason=f"needs {suite}: {SUITES[suite].install}")
    return pytest.param(name, *more, marks=[skip] + [pytest.mark.slow] * (suite != "gymnax"), id=name)


CASES = [*map(case, NAMES)]


class Step(NamedTuple):
    """What one step was given and gave."""

    seen: Any
    mask: Any
    action: Any
    transition: envs.Transition  # its state left out
    alive: Any  # whether the episode had not ended before


def random_policy(environment):
    """Equal logits, or a wide normal draw, for every action."""
    size = envs.output_size(environment.action_space, sampled=True)
    return envs.network_policy(environment, lambda features: jnp.zeros(size), sampled=True)


def record(environment, policy, key):
    """Steps [STEPS] of one episode, with the keys that `run_episode` derives."""
    reset_key, steps_key = jax.random.split(key)
    observation, state = environment.reset(reset_key)

    def body(carry, t):
        observation, state, alive = carry
        action_key, step_key = jax.random.split(jax.random.fold_in(steps_key, t))
        mask = () if environment.action_mask is None else (environment.action_mask(state),)
        action = policy(observation, action_key, *mask)
        made = environment.step(step_key, state, action)
        step = Step(observation, mask, action, made._replace(state=()), alive)
        return (made.observation, made.state, alive & ~(made.terminated | made.truncated)), step

    return jax.lax.scan(body, (observation, state, jnp.bool_(True)), jnp.arange(STEPS))[1]


@pytest.fixture(scope="module", params=CASES)
def recorded(request):
    """An environment, the compiled recorder and the steps [EPISODES, STEPS] of its episodes."""
    environment = envs.make(request.param)
    environment = envs.with_time_limit(environment, min(STEPS, environment.max_steps))
    play = jax.jit(jax.vmap(functools.partial(record, environment, random_policy(environment))))
    keys = jax.random.split(jax.random.key(3), EPISODES)
    return types.SimpleNamespace(environment=environment, play=play, keys=keys, steps=jax.tree.map(np.asarray, play(keys)))


def alive(recorded, values):
    """Values of the steps before the end of their episodes."""
    return values[recorded.steps.alive]


# --- the properties -----------------------------------------------------------------------------------------------------


def test_shapes_and_types(recorded):
    environment, steps, lead = recorded.environment, recorded.steps, (EPISODES, STEPS)
    assert steps.seen.shape == steps.transition.observation.shape == (*lead, *environment.observation_shape)
    assert steps.seen.dtype == steps.transition.observation.dtype == np.float32
    for field, dtype in (("reward", np.float32), ("terminated", bool), ("truncated", bool)):
        value = getattr(steps.transition, field)
        assert (value.shape, value.dtype) == (lead, dtype), field


def test_the_state_keeps_its_types(recorded):
    environment = recorded.environment
    key = jax.eval_shape(lambda: jax.random.key(0))
    _, state = jax.eval_shape(environment.reset, key)
    action = jax.ShapeDtypeStruct(recorded.steps.action.shape[2:], recorded.steps.action.dtype)
    after = jax.eval_shape(environment.step, key, state, action).state
    assert jax.tree.structure(state) == jax.tree.structure(after)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(state)] == [(x.shape, x.dtype) for x in jax.tree.leaves(after)]


def test_the_key_decides(recorded):
    again = recorded.play(recorded.keys)
    jax.tree.map(np.testing.assert_array_equal, again, recorded.steps)
    other = recorded.play(jax.random.split(jax.random.key(4), EPISODES))
    assert (np.asarray(other.action) != recorded.steps.action).any()
    assert (np.asarray(other.seen) != recorded.steps.seen).any()


def test_episodes_side_by_side_do_not_meet(recorded):
    reversed_steps = jax.tree.map(lambda x: np.asarray(x)[::-1], recorded.play(recorded.keys[::-1]))
    jax.tree.map(np.testing.assert_array_equal, reversed_steps, recorded.steps)


def test_nothing_recompiles(recorded):
    recorded.play(jax.random.split(jax.random.key(5), EPISODES))
    assert recorded.play._cache_size() == 1


def test_everything_is_finite(recorded):
    for values in (recorded.steps.seen, recorded.steps.transition.observation, recorded.steps.transition.reward):
        assert np.isfinite(alive(recorded, values)).all()


def test_something_happens(recorded):
    """Observations change within an episode, or the task ended at once."""
    moved = (recorded.steps.seen != recorded.steps.transition.observation).reshape(EPISODES, STEPS, -1).any(axis=2)
    assert moved[:, 0].any() and recorded.steps.alive[:, 0].all()


def test_episodes_end_at_the_limit(recorded):
    assert recorded.environment.max_steps <= STEPS
    limit = recorded.environment.max_steps - 1
    terminated, truncated = recorded.steps.transition.terminated, recorded.steps.transition.truncated
    assert (terminated | truncated)[:, limit][recorded.steps.alive[:, limit]].all()
    assert not truncated[:, :limit][recorded.steps.alive[:, :limit]].any()  # and not before


def test_actions_lie_in_their_space(recorded):
    space, action = recorded.environment.action_space, recorded.steps.action
    lead = (EPISODES, STEPS)
    if isinstance(space, envs.PerAgent):
        space, lead = space.space, (*lead, space.agents)
    if isinstance(space, envs.Continuous):
        assert (action.shape, action.dtype) == ((*lead, *space.shape), np.float32)
        assert (action >= space.low).all() and (action <= space.high).all() and np.ptp(action) > 0
    else:
        sizes = np.array(space.sizes if isinstance(space, envs.MultiDiscrete) else space.n)
        assert (action.shape, action.dtype) == ((*lead, *sizes.shape), np.int32)
        assert (action >= 0).all() and (action < sizes).all() and np.ptp(action) > 0


def test_the_mask_is_respected(recorded):
    if recorded.environment.action_mask is None:
        pytest.skip("every action is allowed")
    (mask,), action = recorded.steps.mask, recorded.steps.action
    assert mask.dtype == bool and alive(recorded, mask).any(axis=-1).all()
    assert alive(recorded, np.take_along_axis(mask, action[..., None], axis=-1)).all()
    assert not alive(recorded, mask).all()  # something was forbidden


def test_rollout_equals_the_record_and_stops_with_the_last(recorded):
    """Bodies in contact amplify the rounding of another compilation, so brax is compared over its first steps."""
    limit = 5 if recorded.environment.name.startswith("brax") else min(STEPS, recorded.environment.max_steps)
    environment = envs.with_time_limit(recorded.environment, limit)
    policy, calls = random_policy(environment), []

    def counted(observation, *more):
        jax.debug.callback(lambda x: calls.append(x), observation.reshape(-1)[0])
        return policy(observation, *more)

    episodes = jax.jit(jax.vmap(lambda key: envs.run_episode(environment, counted, key=key)))(recorded.keys)
    jax.block_until_ready(episodes)
    jax.effects_barrier()
    steps = jax.tree.map(lambda x: x[:, :limit], recorded.steps)
    np.testing.assert_array_equal(episodes.steps, steps.alive.sum(axis=1))
    returns = np.where(steps.alive, steps.transition.reward, 0).sum(axis=1)
    np.testing.assert_allclose(episodes.total_reward, returns, rtol=1e-3, atol=1e-3)
    assert len(calls) == EPISODES * episodes.steps.max()


# --- against the suites themselves --------------------------------------------------------------------------------------


def jumanji_native(name, key, actions):
    import jumanji

    env = jumanji.make(name)
    state, timestep = jax.jit(env.reset)(key)
    step = jax.jit(env.step)
    for action in actions:
        state, timestep = step(state, action)
        yield timestep.observation, timestep.reward, timestep.last()


def navix_native(name, key, actions):
    import navix

    env = navix.make(f"Navix-{name}")
    timestep, step = jax.jit(env.reset)(key), jax.jit(env.step)
    for action in actions:
        timestep = step(timestep, action)
        yield timestep.observation, timestep.reward, timestep.is_done()


def brax_native(name, key, actions):
    from brax.envs import get_environment

    env = get_environment(name, backend="generalized")
    state, step = jax.jit(env.reset)(key), jax.jit(env.step)
    for action in actions:
        state = step(state, action)
        yield state.obs, state.reward, state.done > 0


def craftax_native(name, key, actions):
    from craftax.craftax_env import make_craftax_env_from_name

    env = make_craftax_env_from_name(name, auto_reset=False)
    _, state = env.reset(key)
    for action in actions:
        observation, state, reward, done, _ = env.step(STEP_KEY, state, action)
        yield observation, reward, done


def kinetix_native(name, key, actions):
    """The level loaded in the suite's other way, as one of several; ours has let jax2d run by now."""
    from kinetix.environment import ActionType, EnvParams, ObservationType, make_kinetix_env
    from kinetix.util.saving import load_evaluation_levels

    levels, static_params = load_evaluation_levels([f"{name}.json"])
    start = jax.tree.map(lambda x: x[0], levels)
    kinds = (ActionType.MULTI_DISCRETE, ObservationType.SYMBOLIC_FLAT)
    env = make_kinetix_env(*kinds, None, EnvParams(), static_params, auto_reset=False)
    _, state = env.reset(key, EnvParams(), start)
    for action in actions:
        observation, state, reward, done, _ = env.step(STEP_KEY, state, action, EnvParams())
        yield observation, reward, done


def mpe_native(name, key, actions):
    import jaxmarl

    env = jaxmarl.make(f"MPE_{name}")
    _, state = env.reset(key)
    for action in actions:
        views, state, rewards, dones, _ = env.step_env(STEP_KEY, state, dict(zip(env.agents, action, strict=True)))
        yield [views[a] for a in env.agents], sum(rewards.values()) / len(env.agents), dones["__all__"]


STEP_KEY = jax.random.key(8)
NATIVE = [
    (jumanji_native, "jumanji/Snake-v1", lambda x: [x.grid, x.step_count]),
    (jumanji_native, "jumanji/Game2048-v1", lambda x: [x.board]),
    (jumanji_native, "jumanji/Knapsack-v1", lambda x: [x.weights, x.values, x.packed_items]),
    (navix_native, "navix/DoorKey-8x8-v0", lambda x: [x]),
    (brax_native, "brax/inverted_double_pendulum", lambda x: [x]),
    (craftax_native, "craftax/Craftax-Classic-Symbolic-v1", lambda x: [x]),
    (kinetix_native, "kinetix/s/h1_thrust_over_ball", lambda x: [x]),
    (mpe_native, "mpe/simple_spread_v3", lambda x: [jnp.concatenate([view, jnp.eye(3)[i]]) for i, view in enumerate(x)]),
    (
        mpe_native,
        "mpe/simple_speaker_listener_v4",
        lambda x: [x[0], jnp.zeros(8), jnp.float32([1, 0]), x[1], jnp.float32([0, 1])],
    ),
]


@pytest.mark.parametrize(("name", "native", "parts"), [case(name, native, parts) for native, name, parts in NATIVE])
def test_steps_are_those_of_the_suite(name, native, parts, standard_promotion):
    environment = envs.make(name)
    key = jax.random.key(6)
    observation, state = jax.jit(environment.reset)(key)
    step, choose = jax.jit(environment.step), jax.jit(random_policy(environment))
    ours, actions = [], []
    for t in range(12):
        mask = () if environment.action_mask is None else (environment.action_mask(state),)
        actions.append(choose(observation, jax.random.fold_in(key, t), *mask))
        observation, state, reward, terminated, truncated = step(STEP_KEY, state, actions[-1])
        ours.append((observation, reward, terminated | truncated))
        if terminated or truncated:
            break
    for mine, (observation, reward, done) in zip(ours, native(name.partition("/")[2], key, actions), strict=True):
        expected = np.concatenate([np.ravel(part) for part in parts(observation)])
        np.testing.assert_allclose(np.ravel(mine[0]), expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(mine[1], reward, rtol=1e-4, atol=1e-5)
        assert bool(mine[2]) == bool(done)
