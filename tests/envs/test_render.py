"""Pictures of policies: which states are shown, what the drawings show, the file, and every suite that draws."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageColor, ImageSequence

from eggroll import envs
from eggroll.envs.drawing import render
from eggroll.envs.drawing.canvas import PALETTE, Canvas
from eggroll.envs.drawing.drawing import CLASSIC_CONTROL
from eggroll.envs.drawing.render import check_drawing, gif, play_states, render_episode
from eggroll.envs.registry import SUITES

KEY = jax.random.key(2)


def counting(ends_at, *, draw=None, masked=False):
    """An environment whose state is the number of steps; the action is added to the observation."""

    def step(key, state, action):
        return envs.Transition(action[None], state + 1, jnp.float32(1), state + 1 >= ends_at, jnp.bool_(False))

    return envs.Environment(
        "counting",
        reset=lambda key: (jnp.zeros(1), jnp.int32(0)),
        step=step,
        observation_shape=(1,),
        action_space=envs.Continuous((), np.float32(-np.inf), np.float32(np.inf)),
        max_steps=50,
        action_mask=(lambda state: state[None] >= 0) if masked else None,
        draw=draw,
    )


def shade(state):
    """A grey picture, darker in every step."""
    return np.full((6, 8, 3), 255 - 4 * int(state), np.uint8)


def stay(observation, key, mask=None):
    return jnp.float32(0)


def counted(environment, policy=stay, *, max_states=100, memory=None):
    states = play_states(environment, policy, key=KEY, statistics=None, memory=memory, max_states=max_states)
    return [int(state) for state in states]


def sampled_policy(environment):
    """Equal logits, or a wide normal draw, for every action."""
    size = envs.output_size(environment.action_space, sampled=True)
    return envs.network_policy(environment, lambda features: jnp.zeros(size), sampled=True)


def read(path):
    """Frames [n, height, width, 3] and times in milliseconds [n] of a GIF; equal frames in a row are one."""
    with Image.open(path) as image:
        frames = [(np.asarray(frame.convert("RGB")), frame.info["duration"]) for frame in ImageSequence.Iterator(image)]
        assert image.info["loop"] == 0
    return np.stack([pixels for pixels, _ in frames]), [time for _, time in frames]


# --- states -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends_at", [1, 2, 7, 8, 9, 50, 1000])
@pytest.mark.parametrize("max_states", [2, 3, 8, 100])
def test_states_are_evenly_spaced_from_first_to_last(ends_at, max_states):
    states = counted(counting(ends_at), max_states=max_states)
    assert states[0] == 0 and states[-1] == min(ends_at, 50)
    assert len(states) == states[-1] + 1 if states[-1] < max_states else max_states / 2 <= len(states) <= max_states
    gaps = np.diff(states)
    assert (gaps[:-1] == gaps[0]).all() and 0 < gaps[-1] <= gaps[0]


def test_a_policy_gets_its_memory_and_the_mask():
    seen = []

    def policy(memory, observation, key, mask):
        jax.debug.callback(lambda *x: seen.append([float(y) for y in x]), memory, observation[0], mask[0])
        return memory + 1, memory

    assert counted(counting(4, masked=True), policy, memory=jnp.float32(0)) == [0, 1, 2, 3, 4]
    jax.effects_barrier()
    assert seen == [[0, 0, 1], [1, 0, 1], [2, 1, 1], [3, 2, 1]]


def test_an_observation_that_is_not_finite_ends_the_episode():
    assert counted(counting(9), lambda observation, key: jnp.float32(jnp.nan)) == [0, 1]


def test_the_episode_is_that_of_run_episode():
    environment = envs.make("CartPole-v1")
    statistics = envs.ObservationStatistics(jnp.float32(9), jnp.full(4, 0.01), jnp.full(4, 0.1))

    def network(features):
        return 3 * jnp.stack([-features[2], features[2]])

    policy = envs.network_policy(environment, network, sampled=True)
    run = jax.jit(lambda key: envs.run_episode(environment, policy, key=key, statistics=statistics))
    lengths = set()
    for key in jax.random.split(KEY):
        episode = run(key)
        states = play_states(environment, policy, key=key, statistics=statistics, memory=None, max_states=600)
        assert len(states) == episode.steps + 1
        lengths.add(len(states))
    assert len(lengths) > 1


# --- the file -----------------------------------------------------------------------------------------------------------


def test_cartpole(tmp_path):
    environment = envs.make("CartPole-v1")
    path = render_episode(environment, sampled_policy(environment), key=KEY, path=tmp_path / "episode.gif")
    steps = int(envs.run_episode(environment, sampled_policy(environment), key=KEY).steps)
    frames, times = read(path)
    assert path == tmp_path / "episode.gif" and path.stat().st_size < 100_000
    assert sum(times) == 200 * steps + 1000 and steps > 8  # steps + 1 frames, the last one stays
    assert frames.shape[1:] == (128, 320, 3) and len(frames) > steps / 2


def test_frames_are_the_drawings_in_order(tmp_path):
    path = render_episode(counting(20, draw=shade), stay, key=KEY, path=str(tmp_path / "x.gif"), max_frames=8)
    frames, times = read(path)
    np.testing.assert_array_equal(frames[:, 0, 0, 0], [255 - 4 * state for state in (0, 4, 8, 12, 16, 20)])
    assert times == [200] * 5 + [1000]


def test_a_large_file_gets_fewer_frames(monkeypatch):
    frames = list(np.random.default_rng(0).integers(0, 255, (9, 32, 32, 3), np.uint8))
    monkeypatch.setattr(render, "MAX_BYTES", len(gif(frames)) // 2)
    small = gif(frames)
    assert len(small) <= render.MAX_BYTES
    assert small == gif(frames[::4]) and small != gif(frames[:3])


def test_an_environment_without_a_drawing_gives_none(tmp_path):
    assert render_episode(counting(3), stay, key=KEY, path=tmp_path / "x.gif") is None
    assert envs.make("Catch-bsuite").draw is None and not list(tmp_path.iterdir())


DRAWINGS = [
    (
        lambda state: np.zeros((4, 4, 3)),
        r"env 'counting': draw must return a picture uint8 \[height, width, 3\], got float64",
    ),
    (lambda state: np.zeros((4, 4), np.uint8), r"got uint8\[4, 4\]\.$"),
    (lambda state: None, r"got object\[\]\.$"),
    (lambda state: {}["x"], r"env 'counting': draw raised KeyError: 'x' \(test_render.py, line \d+\)\.$"),
]


@pytest.mark.parametrize(("draw", "words"), DRAWINGS)
def test_what_is_no_picture_is_said_before_it_is_needed(draw, words):
    check_drawing(counting(3, draw=shade))
    with pytest.raises(ValueError, match=words):
        check_drawing(counting(3, draw=draw))


@pytest.mark.parametrize("max_frames", [1, 2.5])
def test_bad_number_of_frames(max_frames, tmp_path):
    with pytest.raises(ValueError, match="max_frames must be an integer >= 2"):
        render_episode(counting(3, draw=shade), stay, key=KEY, path=tmp_path / "x.gif", max_frames=max_frames)


def test_a_time_limit_keeps_the_drawing(tmp_path):
    limited = envs.with_time_limit(counting(20, draw=shade), 3)
    frames, _ = read(render_episode(limited, stay, key=KEY, path=tmp_path / "x.gif"))
    np.testing.assert_array_equal(frames[:, 0, 0, 0], [255, 251, 247, 243])


# --- the drawings -------------------------------------------------------------------------------------------------------


def place(pixels, colour):
    """Mean place of a colour as fractions of the width from the left and of the height from below."""
    rows, columns = np.nonzero((pixels == ImageColor.getrgb(colour)).all(axis=-1))
    return columns.mean() / pixels.shape[1], 1 - rows.mean() / pixels.shape[0]


def test_canvas_has_the_coordinates_of_the_world():
    canvas = Canvas(-2, 0, 2, 1)
    canvas.circle((1, 0.25), 0.1, PALETTE[0])
    pixels = canvas.pixels()
    assert (pixels.shape, pixels.dtype) == ((80, 320, 3), np.uint8)
    assert place(pixels, PALETTE[0]) == pytest.approx((0.75, 0.25), abs=0.01)


@pytest.mark.parametrize(
    ("name", "state", "colour", "expected"),
    [
        ("CartPole-v1", {"x": 1.5, "theta": 0.0}, PALETTE[1], (0.75, 0.565)),
        ("CartPole-v1", {"x": 0.0, "theta": np.pi / 2}, PALETTE[1], (0.59, 0.33)),  # positive angles lean to the right
        ("Pendulum-v1", {"theta": 0.0}, PALETTE[3], (0.5, 0.71)),  # upright
        ("Pendulum-v1", {"theta": np.pi / 2}, PALETTE[3], (0.29, 0.5)),
        ("Acrobot-v1", {"joint_angle1": 0.0, "joint_angle2": 0.0}, PALETTE[4], (0.5, 0.17)),  # hanging
        ("Acrobot-v1", {"joint_angle1": np.pi / 2, "joint_angle2": np.pi / 2}, PALETTE[4], (0.72, 0.61)),
        ("MountainCar-v0", {"position": -np.pi / 6}, PALETTE[0], (0.376, 0.112)),  # in the valley
        ("MountainCarContinuous-v0", {"position": 0.45}, PALETTE[0], (0.917, 0.823)),
    ],
)
def test_classic_control_is_drawn_where_it_is(name, state, colour, expected):
    pixels = CLASSIC_CONTROL[name](SimpleNamespace(**state))
    assert place(pixels, colour) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_a_state_out_of_bounds_gives_a_picture(value):
    assert CLASSIC_CONTROL["MountainCar-v0"](SimpleNamespace(position=value)).shape == (222, 320, 3)


def case(name):
    """A slow row, skipped where the suite is not installed."""
    suite = name.split("/")[0] if "/" in name else "gymnax"
    skip = pytest.mark.skipif(not envs.is_installed(suite), reason=f"needs {suite}: {SUITES[suite].install}")
    marks = [skip, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
    return pytest.param(name, marks=marks, id=name)


LONG = ("kinetix/s/h1_thrust_over_ball", "craftax/Craftax-Symbolic-v1")  # one takes 100 s
NAMES = [
    *["Acrobot-v1", "navix/DoorKey-8x8-v0", "mpe/simple_spread_v3", "mpe/simple_speaker_listener_v4", "jumanji/Snake-v1"],
    *["jumanji/RubiksCube-v0", "brax/ant@spring", "brax/reacher", "kinetix/s/h1_thrust_over_ball"],
    *["craftax/Craftax-Classic-Symbolic-v1", "craftax/Craftax-Symbolic-v1"],
]


@pytest.mark.parametrize("name", [case(name) for name in NAMES])
def test_every_suite_draws(name, tmp_path):
    environment = envs.make(name, max_steps=12)
    path = render_episode(environment, sampled_policy(environment), key=KEY, path=tmp_path / "episode.gif")
    frames, _ = read(path)
    assert max(frames.shape[1:3]) <= 400 and path.stat().st_size < 1_000_000
    assert len(frames) > 1 and all(len(np.unique(frame.reshape(-1, 3), axis=0)) > 2 for frame in frames)


@pytest.mark.parametrize("name", [case("brax/fast"), case("jumanji/MMST-v0")])
def test_these_have_no_drawing(name):
    assert envs.make(name).draw is None
