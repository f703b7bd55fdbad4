"""Environments by name: gymnax's bare names, "suite/name" for the other suites, and environments registered by users.

A suite is imported only when one of its environments is made. The adapter of each suite has `names()` and `make(name)`, with
names without the prefix.
"""

import contextlib
import dataclasses
import difflib
import heapq
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from types import ModuleType

from eggroll.envs.checks import check_environment, describe_error
from eggroll.envs.protocol import Environment, with_time_limit
from eggroll.envs.suites.deferred import deferred


@dataclasses.dataclass(frozen=True)
class Suite:
    """A suite of environments that can be installed."""

    package: str  # the module it installs
    install: str  # the command that installs it
    examples: tuple[str, ...]  # names, without the prefix, for suggestions when it is not imported
    deferred: tuple[str, ...] = ()  # modules that it imports and needs only to draw


# The metadata of kinetix-env asks for jax <= 0.9.0 and more than it imports; its extra in pyproject.toml lists the same.
_KINETIX = (
    "pip install --no-deps kinetix-env==3.0.2 && pip install jax2d==1.0.1 jaxgl distrax grain hydra-core imageio pygame "
    "pygame_widgets==1.1.5 safetensors seaborn wandb zarr==2.18.3 numcodecs==0.13.1"
)

_BRAX = (
    *("ant", "halfcheetah", "hopper", "humanoid", "humanoidstandup", "inverted_double_pendulum", "inverted_pendulum"),
    *("pusher", "reacher", "swimmer", "walker2d"),
)

SUITES = {
    "gymnax": Suite(
        "gymnax",
        "pip install gymnax six",
        ("CartPole-v1", "Pendulum-v1"),
        deferred=("matplotlib", "matplotlib.colors", "matplotlib.pyplot", "seaborn"),
    ),
    "brax": Suite("brax", "pip install brax", _BRAX),
    "jumanji": Suite("jumanji", "pip install jumanji", ("Game2048-v1", "Knapsack-v1", "Snake-v1")),
    "navix": Suite("navix", "pip install navix", ("DoorKey-8x8-v0", "Dynamic-Obstacles-6x6-Random-v0", "FourRooms-v0")),
    "craftax": Suite("craftax", "pip install craftax", ("Craftax-Classic-Symbolic-v1", "Craftax-Symbolic-v1")),
    "kinetix": Suite("kinetix", _KINETIX, ("s/h1_thrust_over_ball", "m/h17_thrustcontrol_left", "l/hard_pinball")),
    "mpe": Suite("jaxmarl", "pip install jaxmarl", ("simple_spread_v3", "simple_speaker_listener_v4", "simple_reference_v3")),
}

_registered: dict[str, Callable[[], Environment]] = {}


def register(name: str, factory: Callable[[], Environment]) -> None:
    """Register an environment, so that `make(name)` returns `factory()`.

    Args:
        name: not taken by a registered environment; it takes precedence over a suite's environment of the same name.
        factory: called by each `make`.

    Raises:
        ValueError: the name is empty or taken by another factory.
        TypeError: `factory` is not callable.
    """
    if not callable(factory):
        raise TypeError(f"factory must be a function that returns an Environment, got {type(factory).__name__}.")
    if not name or _registered.get(name, factory) is not factory:
        raise ValueError(f"name must be a new, non-empty name, got {name!r}.")
    _registered[name] = factory


def is_installed(suite: str) -> bool:
    """Return whether the package of a suite, one of `SUITES`, is installed, without importing it."""
    return importlib.util.find_spec(SUITES[suite].package) is not None


def names(suite: str) -> list[str]:
    """Return the names in a suite, one of `SUITES`, as `make` takes them.

    Raises:
        ModuleNotFoundError: the suite is not installed; the message has the command that installs it.
    """
    prefix = "" if suite == "gymnax" else f"{suite}/"
    with _modules_needed(suite, for_name=f"{suite}/..."):
        return [prefix + name for name in _module(suite).names()]


def make(name: str, *, max_steps: int | None = None) -> Environment:
    """Make an environment by its name.

    Args:
        name: registered by `register`, one of gymnax such as "CartPole-v1", or "suite/name" such as "brax/ant". A suite with
            variants takes "suite/name@variant": a backend of brax ("brax/ant@spring"), a kind of actions of kinetix.
        max_steps: number of steps after which episodes are truncated; None: the suite's own.

    Returns:
        The `Environment`.

    Raises:
        ValueError: no suite has it; the message suggests the nearest names.
        ModuleNotFoundError: the suite is not installed; the message has the command that installs it.
        TypeError, ValueError: a registered environment is not as `Environment` describes it, or raises an error.
    """
    environment = _make_registered(name) if name in _registered else _make_from_suite(str(name))
    return environment if max_steps is None else with_time_limit(environment, max_steps)


def _make_registered(name: str) -> Environment:
    try:
        environment = _registered[name]()
    except Exception as error:
        raise ValueError(f"env '{name}': {describe_error('its factory', error)}") from error
    if not isinstance(environment, Environment):
        numpy = "; envs.Simulator plays an environment of gymnasium" * hasattr(environment, "observation_space")
        raise TypeError(f"the factory of '{name}' must return an envs.Environment, got {type(environment).__name__}{numpy}.")
    check_environment(environment)
    return environment


def _make_from_suite(name: str) -> Environment:
    suite, _, short = name.partition("/")
    if suite == "gymnasium":
        raise ValueError(f"env '{name}' is not a JAX function: envs.Simulator plays environments of gymnasium.")
    if suite not in SUITES or not short:
        suite, short = "gymnax", name
    if suite == "gymnax" and "/" in short:
        raise ValueError(_unknown(name, []))
    with _modules_needed(suite, for_name=name):
        module = _module(suite)
        if short.partition("@")[0] in module.names():
            return module.make(short)
    raise ValueError(_unknown(name, names(suite)))


def _module(suite: str) -> ModuleType:
    """Import a suite and its adapter."""
    with deferred(*SUITES[suite].deferred):
        importlib.import_module(SUITES[suite].package)
    return importlib.import_module(f"eggroll.envs.suites.{suite}")


@contextlib.contextmanager
def _modules_needed(suite: str, *, for_name: str) -> Iterator[None]:
    """Name the command that installs a missing module; suites import some modules only when an environment is made."""
    try:
        yield
    except ModuleNotFoundError as error:
        install = SUITES[suite].install
        message = f"env '{for_name}' needs the module {error.name}, which is not installed; {install} installs it."
        raise ModuleNotFoundError(message, name=error.name) from error


def _unknown(name: str, known: list[str]) -> str:
    """Return the error for an unknown name, with similar names of its suite and of all examples, or else all names."""
    examples = [f"{suite}/{example}" for suite, row in SUITES.items() if suite != "gymnax" for example in row.examples]
    candidates = list(dict.fromkeys((*_registered, *known, *examples)))

    def likeness(other: str) -> float:
        forms = {other.lower(), other.lower().rpartition("/")[2]}  # "ant" is near "brax/ant"
        return max(difflib.SequenceMatcher(None, name.lower(), form).ratio() for form in forms)

    near = [other for other in heapq.nlargest(3, candidates, key=likeness) if likeness(other) > 0.5]
    suggestion = f"did you mean {' or '.join(near)}" if near else f"known are {', '.join(candidates)}"
    return f"env must name an environment, got {name!r}; {suggestion}."
