"""Pictures of states, one drawing per suite: `draw(state)` gives uint8 [height, width, 3], at most about 400 pixels a side.

navix, craftax, kinetix and jumanji draw themselves. What has no drawing of its own that works without a display and without
more packages is drawn here: gymnax's classic control, the particle environments, and brax (its bodies are capsules and spheres,
seen from the side and from above). Suites and matplotlib are imported when something is drawn.
"""

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from eggroll.envs.adapter import promotion_allowed
from eggroll.envs.drawing.canvas import GOAL, GREY, INK, PALE, PALETTE, Canvas

Draw = Callable[[Any], np.ndarray]

ELEVATION = math.radians(25)  # of the view of brax's bodies


def _enlarged(pixels: Any, side: int = 384) -> np.ndarray:
    """Return a small picture, numbers 0 to 255, [height, width, 3], with every pixel repeated as often as fits `side`."""
    pixels = np.clip(np.asarray(pixels), 0, 255).astype(np.uint8)
    times = max(1, side // max(pixels.shape[:2]))
    return pixels.repeat(times, axis=0).repeat(times, axis=1)


# --- gymnax's classic control -------------------------------------------------------------------------------------------


def _number(value: Any) -> float:
    """Return a scalar; 0 where it is not finite, for the state that ends an episode is drawn too."""
    return float(np.nan_to_num(np.asarray(value, np.float64), posinf=0, neginf=0))


def _cart_pole(state: Any) -> np.ndarray:
    x, angle = _number(state.x), _number(state.theta)
    canvas = Canvas(-3, -0.7, 3, 1.7)
    canvas.line([(-3, 0), (3, 0)], 0, GREY)
    for limit in (-2.4, 2.4):
        canvas.line([(limit, -0.15), (limit, 0.15)], 0.03, PALETTE[3])
    canvas.polygon([(x - 0.35, -0.2), (x + 0.35, -0.2), (x + 0.35, 0.2), (x - 0.35, 0.2)], INK)
    canvas.line([(x, 0.1), (x + math.sin(angle), 0.1 + math.cos(angle))], 0.13, PALETTE[1])
    canvas.circle((x, 0.1), 0.06, PALE)
    return canvas.pixels()


def _pendulum(state: Any) -> np.ndarray:
    angle = _number(state.theta)  # 0 is upright
    canvas = Canvas(-1.3, -1.3, 1.3, 1.3)
    canvas.line([(0, 0), (-math.sin(angle), math.cos(angle))], 0.2, PALETTE[3])
    canvas.circle((0, 0), 0.05, INK)
    return canvas.pixels()


def _acrobot(state: Any) -> np.ndarray:
    first, second = _number(state.joint_angle1), _number(state.joint_angle1 + state.joint_angle2)  # 0 is downwards
    elbow = (math.sin(first), -math.cos(first))
    tip = (elbow[0] + math.sin(second), elbow[1] - math.cos(second))
    canvas = Canvas(-2.3, -2.3, 2.3, 2.3)
    canvas.line([(-2.3, 1), (2.3, 1)], 0, GOAL)
    canvas.line([(0, 0), elbow], 0.2, PALETTE[0])
    canvas.line([elbow, tip], 0.2, PALETTE[4])
    for joint in ((0, 0), elbow):
        canvas.circle(joint, 0.06, PALE)
    return canvas.pixels()


def _mountain_car(state: Any, *, goal: float) -> np.ndarray:
    def on_hill(x: Any, *, above: float = 0) -> np.ndarray:
        return np.stack([x, 0.45 * np.sin(3 * np.asarray(x)) + 0.55 + above], axis=-1)

    canvas = Canvas(-1.2, 0, 0.6, 1.25)
    hill = on_hill(np.linspace(-1.2, 0.6, 100))
    canvas.polygon([*hill, (0.6, 0), (-1.2, 0)], PALE)
    canvas.line(hill, 0, GREY)
    (x, foot), top = on_hill(goal), on_hill(goal, above=0.17)
    canvas.line([(x, foot), top], 0.008, INK)
    canvas.polygon([top, (x, foot + 0.1), (x + 0.09, foot + 0.135)], GOAL)
    canvas.circle(on_hill(_number(state.position), above=0.04), 0.04, PALETTE[0])
    return canvas.pixels()


CLASSIC_CONTROL: dict[str, Draw] = {
    "CartPole-v1": _cart_pole,
    "Pendulum-v1": _pendulum,
    "Acrobot-v1": _acrobot,
    "MountainCar-v0": functools.partial(_mountain_car, goal=0.5),
    "MountainCarContinuous-v0": functools.partial(_mountain_car, goal=0.45),
}


# --- particles and bodies -----------------------------------------------------------------------------------------------


def particles(env: Any) -> Draw | None:
    """Return the drawing of a particle environment, or None where `env` tells no radii.

    Agents have their numbers next to them; those that speak are listed with their words. A landmark that is somebody's goal has
    a dark rim.
    """
    if not hasattr(env, "rad"):
        return None
    radii, colours = np.asarray(env.rad), [tuple(int(part) for part in colour) for colour in np.asarray(env.colour)]
    speakers = np.flatnonzero(np.asarray(env.silent) == 0).tolist()

    def draw(state: Any) -> np.ndarray:
        canvas = Canvas(-2, -2, 2, 2)
        places = np.asarray(state.p_pos)
        goals = [] if state.goal is None else (np.ravel(state.goal) + env.num_agents).tolist()
        for index in [*range(env.num_agents, env.num_entities), *range(env.num_agents)]:  # agents lie on top
            canvas.circle(places[index], float(radii[index]), colours[index], outline=INK if index in goals else None)
        for agent, (x, y) in enumerate(places[: env.num_agents]):
            canvas.text((x + radii[agent] + 0.02, y + radii[agent]), str(agent))
        for row, agent in enumerate(speakers):
            words = np.asarray(state.c[agent])
            said = str(int(np.argmax(words))) if words.any() else "nothing"
            canvas.text((-1.95, 1.95 - 0.2 * row), f"{agent} says {said}")
        return canvas.pixels()

    return draw


def bodies(env: Any) -> Draw | None:
    """Return the drawing of a brax environment, or None for one that has no bodies.

    The view is parallel, along y and from above. It follows bodies that walk or swim: those whose model has a camera, as all of
    brax's have. Lines on the floor are 1 m apart.
    """
    model = getattr(getattr(getattr(env, "unwrapped", None), "sys", None), "mj_model", None)
    if model is None:
        return None
    import mujoco

    data = mujoco.MjData(model)
    plane = model.geom_type == mujoco.mjtGeom.mjGEOM_PLANE
    capsule = model.geom_type == mujoco.mjtGeom.mjGEOM_CAPSULE
    radius, half = model.geom_size[:, 0], np.where(capsule, model.geom_size[:, 1], 0)

    def ends(position: Any) -> np.ndarray:
        """Both ends of the axis of every body, [bodies, 2, 3]."""
        data.qpos[:] = np.nan_to_num(np.asarray(position))
        mujoco.mj_kinematics(model, data)
        axis = data.geom_xmat.reshape(-1, 3, 3)[:, :, 2] * half[:, None]
        return np.stack([data.geom_xpos - axis, data.geom_xpos + axis], axis=1)

    start = ends(model.qpos0)[~plane]
    middle = (start.min(axis=(0, 1)) + start.max(axis=(0, 1))) / 2
    reach = 1.3 * np.abs(start - middle).max() + radius[~plane].max()
    floor = data.geom_xpos[plane, 2]

    def project(points: Any) -> np.ndarray:
        x, y, z = np.moveaxis(np.asarray(points), -1, 0)
        return np.stack([x, y * math.sin(ELEVATION) + z * math.cos(ELEVATION)], axis=-1)

    def draw(state: Any) -> np.ndarray:
        lines = ends(state.pipeline_state.q)
        centre = middle.copy()
        if model.ncam:
            centre[:2] = lines[~plane].mean(axis=(0, 1))[:2]
        x, y = project(centre)
        canvas = Canvas(x - reach, y - reach, x + reach, y + reach)
        for height in floor:
            _floor(canvas, project, centre, height, 3 * reach)
        nearness = lines.mean(axis=1) @ [0, -math.cos(ELEVATION), math.sin(ELEVATION)]
        for index in np.argsort(nearness):
            if not plane[index]:
                colour = PALETTE[model.geom_bodyid[index] % len(PALETTE)]
                canvas.line(project(lines[index]), 2 * radius[index] + 0.02 * reach, INK)
                canvas.line(project(lines[index]), 2 * radius[index], colour)
        return canvas.pixels()

    return draw


def _floor(canvas: Canvas, project: Callable, centre: np.ndarray, height: float, reach: float) -> None:
    """Draw a square of floor around `centre` with a line every meter."""
    x, y = centre[:2]
    corners = [(x - reach, y - reach), (x + reach, y - reach), (x + reach, y + reach), (x - reach, y + reach)]
    canvas.polygon(project([(*corner, height) for corner in corners]), PALE)
    for at in range(math.ceil(x - reach), math.floor(x + reach) + 1):
        canvas.line(project([(at, y - reach, height), (at, y + reach, height)]), 0, "white")
    for at in range(math.ceil(y - reach), math.floor(y + reach) + 1):
        canvas.line(project([(x - reach, at, height), (x + reach, at, height)]), 0, "white")


# --- suites that draw themselves ----------------------------------------------------------------------------------------


@functools.cache
def _navix_rgb() -> Callable:
    from navix.observations import rgb

    return jax.jit(rgb)


def navix(timestep: Any) -> np.ndarray:
    """Draw the whole grid of a navix timestep."""
    with promotion_allowed():
        return _enlarged(_navix_rgb()(timestep.state))


@functools.cache
def _craftax_pixels(classic: bool) -> Callable:
    from craftax.craftax.renderer import make_craftax_pixel_renderer as full
    from craftax.craftax_classic.renderer import make_craftax_pixel_renderer as small

    return jax.jit((small if classic else full)(16))


def craftax(state: Any) -> np.ndarray:
    """Draw what the player of Craftax, or of its classic form, sees, and the inventory."""
    with promotion_allowed():
        return _enlarged(_craftax_pixels(not hasattr(state, "player_level"))(state))


def kinetix(env: Any, params: Any) -> Draw:
    """Return the drawing of a Kinetix level: the green ball has to reach the blue goal."""

    @functools.cache
    def renderer() -> Callable:
        from kinetix.render.renderer_pixels import make_render_pixels

        return make_render_pixels(params, env.static_env_params.replace(downscale=2))

    def draw(state: Any) -> np.ndarray:
        with promotion_allowed():
            return _enlarged(np.asarray(renderer()(state)).transpose(1, 0, 2)[::-1])

    return draw


def jumanji(env: Any) -> Draw | None:
    """Return the drawing of a jumanji environment by its own viewer, or None for MMST, whose viewer leaves it empty."""
    if type(env).__name__ == "MMST":
        return None

    def draw(state: Any) -> np.ndarray:
        from matplotlib import pyplot

        backend = pyplot.get_backend()
        pyplot.switch_backend("agg")  # the viewers draw with pyplot; no window is to open where there is a display
        try:
            with promotion_allowed(), warnings.catch_warnings(), pyplot.rc_context({"figure.dpi": 40}):
                warnings.simplefilter("ignore")  # the viewers "show" the figure
                env.render(state.inner)
                canvas: Any = pyplot.gcf().canvas
                return np.asarray(canvas.buffer_rgba())[..., :3].copy()
        finally:
            env.close()
            pyplot.switch_backend(backend)

    return draw
