"""A picture of a policy: one episode as an animated GIF."""

import io
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from eggroll import envs
from eggroll.envs.checks import check_environment, check_policy, describe_error
from eggroll.envs.normalisation import is_finite
from eggroll.envs.rollout import Policy

MAX_BYTES = 3_000_000  # of a file; a longer animation gets fewer frames
SECONDS = 10  # that an animation takes, within the limits below
FRAME_MS = (40, 200)  # the shortest and the longest time of a frame
LAST_MS = 1000  # the last frame stays
COLOURS = 128


def render_episode(
    environment: envs.Environment,
    policy: Policy,
    *,
    key: Array,
    path: str | Path,
    statistics: envs.ObservationStatistics | None = None,
    memory: Any = None,
    max_frames: int = 300,
) -> Path | None:
    """Play one episode on the CPU and write it as an animated GIF, which loops.

    The episode is the one that `envs.run_episode` plays with the same arguments. A long one is shown by every second state,
    or every fourth, and so on, and its last.

    Args:
        environment: from `envs.make`.
        policy: as `envs.run_episode` takes it.
        key: consumed.
        path: the file, replaced if it exists; its folder exists.
        statistics: the policy sees observations normalised by these; None: as they are.
        memory: what a recurrent policy remembers before the first step; None: the policy has no memory.
        max_frames: at least 2.

    Returns:
        The path, or None where the environment has no drawing (`environment.draw` is None): nothing is played or written.

    Raises:
        ValueError: `max_frames` is not an integer >= 2, or the environment's drawing fails or is no picture.
    """
    if not isinstance(max_frames, int) or max_frames < 2:
        raise ValueError(f"max_frames must be an integer >= 2, got {max_frames!r}.")
    if environment.draw is None:
        return None
    cpu = jax.local_devices(backend="cpu")[0]
    with jax.default_device(cpu):
        key, statistics, memory = jax.device_put((key, statistics, memory), cpu)
        states = play_states(environment, policy, key=key, statistics=statistics, memory=memory, max_states=max_frames)
        frames = [_draw(environment, state) for state in states]
    path = Path(path)
    path.write_bytes(gif(frames))
    return path


def check_drawing(environment: envs.Environment) -> None:
    """Raise ValueError, naming the environment, unless the state after a reset can be drawn."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        _draw(environment, jax.jit(environment.reset)(jax.random.key(0))[1])


def _draw(environment: envs.Environment, state: Any) -> np.ndarray:
    """Draw a state; ValueError where that fails, or what is drawn is no picture."""
    assert environment.draw is not None
    try:
        picture = np.asarray(environment.draw(state))
    except Exception as error:  # the author's code
        raise ValueError(f"env '{environment.name}': {describe_error('draw', error)}.") from error
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
        got = f"{picture.dtype}{list(picture.shape)}"
        raise ValueError(f"env '{environment.name}': draw must return a picture uint8 [height, width, 3], got {got}.")
    return picture


def play_states(
    environment: envs.Environment,
    policy: Policy,
    *,
    key: Array,
    statistics: envs.ObservationStatistics | None,
    memory: Any,
    max_states: int,
) -> list[Any]:
    """Play the episode of `envs.run_episode`; return its states, or evenly spaced ones where there are more than `max_states`.

    Never more states than that are held. The first and the last are among them.
    """
    check_environment(environment)
    check_policy(environment, policy, recurrent=memory is not None)
    reset_key, steps_key = jax.random.split(key)

    @jax.jit
    def advance(observation: Array, state: Any, memory: Any, step: Array) -> tuple[Array, Any, Any, Array]:
        action_key, step_key = jax.random.split(jax.random.fold_in(steps_key, step))
        seen = observation if statistics is None else envs.normalise(statistics, observation)
        mask = () if environment.action_mask is None else (environment.action_mask(state),)
        if memory is None:
            action = policy(seen, action_key, *mask)
        else:
            memory, action = policy(memory, seen, action_key, *mask)
        new_observation, state, reward, terminated, truncated = environment.step(step_key, state, action)
        finite = jnp.isfinite(reward) & is_finite(new_observation) & is_finite(observation)
        return new_observation, state, memory, terminated | truncated | ~finite

    observation, state = jax.jit(environment.reset)(reset_key)
    states, stride = [state], 1
    for step in range(environment.max_steps):
        observation, state, memory, done = advance(observation, state, memory, jnp.int32(step))
        if done or step + 1 == environment.max_steps:
            break
        if (step + 1) % stride == 0:
            states.append(state)
        if len(states) == max_states:
            states, stride = states[::2], 2 * stride
    return [*states, state]


def gif(frames: list[np.ndarray]) -> bytes:
    """Return frames, uint8 [height, width, 3], as a GIF of at most `MAX_BYTES`: a larger one gets every second frame."""
    from PIL import Image

    while True:
        ms = round(float(np.clip(1000 * SECONDS / len(frames), *FRAME_MS)) / 10) * 10  # GIF counts in hundredths of a second
        images = [Image.fromarray(frame).quantize(COLOURS, dither=Image.Dither.NONE) for frame in frames]
        durations = [ms] * (len(images) - 1) + [LAST_MS]
        file = io.BytesIO()
        images[0].save(file, format="GIF", save_all=True, append_images=images[1:], duration=durations, loop=0)
        if file.tell() <= MAX_BYTES or len(frames) <= 2:
            return file.getvalue()
        frames = frames[::-2][::-1]  # the last stays
