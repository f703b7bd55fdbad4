"""The header of a journal identifies its run. A second copy is next to it: `journal.header.json` of `journal.bin`."""

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from eggroll.files import read_object, write_object
from eggroll.journal.environment import UPDATE, describe_environment
from eggroll.journal.fingerprint import fingerprint
from eggroll.noise.leaves import LeafPlan
from eggroll.protocol import S, Strategy

VERSION = 4  # of the file format; 2: the plan has the axes of the noise; 3: the mean fitness is recorded; 4: checksums are
READABLE = (2, 3, 4)
DIGESTED = ("the fitness", "the optimizer", "the schedule of sigma", "the shaping")
FUNCTION = "function "  # a setting that is one, with its name


class JournalError(ValueError):
    """A journal cannot be read, or belongs to another run."""


@dataclasses.dataclass(frozen=True)
class Header:
    """Identity of a run; JSON values."""

    key: list  # implementation and words of the run's key
    config: dict  # settings of the strategy
    plan: list  # one line per parameter
    fingerprint: str  # SHA-256 of the initial parameters
    versions: dict  # of the software that wrote the journal; not compared
    recipe: dict | None = None  # {"function": "module:name", "options": ...}: rebuilds (strategy, initial state)
    version: int = VERSION
    update: int = 1  # version of the update that the run was made with; headers from before it had one have none
    digests: list | None = None  # of `DIGESTED` as this version of JAX traces them, "" where not known; older: of the first two
    environments: list | None = None  # that the run was in (`environment.describe_environment`); not compared

    def check(self, other: "Header", *, accept_change: bool = False, replay: bool = False) -> None:
        """Raise JournalError when `other` is the header of another run, naming the fields.

        Versions and recipe may differ. An update of another version is refused where it rounds stochastically; otherwise it is
        the same up to rounding.

        Args:
            other: the header of the run as it is now.
            accept_change: what has a digest may be another.
            replay: nothing is evaluated, and sigma is recorded, so that only the optimizer must be the same.
        """
        if self.update != other.update and other.config["precision"] not in ("master", "nearest"):
            raise JournalError(
                f"the journal was written with version {self.update} of the update, whose stochastic rounding this library "
                f"(version {other.update}) does not repeat: use the version of eggroll that the run began with."
            )
        for name in ("key", "config", "plan", "fingerprint"):
            stored, given = getattr(self, name), getattr(other, name)
            if name == "config":
                stored, given = self._settings(other), other._settings(self)
            if stored != given:
                raise JournalError(f"the journal belongs to another run: its {_difference(name, stored, given)}.")
        changed = self._changed(other, replay=replay)
        if changed and self.versions.get("jax") != other.versions.get("jax"):
            versions = f"{self.versions.get('jax')} wrote the journal, this is {other.versions.get('jax')}"
            warnings.warn(f"whether {changed} the same as before is not known: jax {versions}.", stacklevel=3)
        elif changed and not accept_change:
            raise JournalError(
                f"{changed} not the same as when the journal was last written: the code, a constant in it, or the shapes of a "
                "batch. Restore them, choose another folder, or continue with accept_change=True (--accept-change)."
            )

    def continued_by(self, other: "Header", *, accept_change: bool) -> "Header":
        """Return the header of a journal that the run of `other` continues: in the format and with the environment of that."""
        known, new = self.environments or [], other.environments or []
        environments = [*known, *(own for own in new if own not in known)] or None
        changed = accept_change and self.digests not in (None, other.digests)
        current = self
        if changed:  # in the config only names of functions can differ
            current = dataclasses.replace(self, digests=other.digests, versions=other.versions, config=other.config)
        if accept_change and other.recipe is not None:
            current = dataclasses.replace(current, recipe=other.recipe)  # what is read from files may have changed
        return dataclasses.replace(current, version=VERSION, environments=environments)

    def _changed(self, other: "Header", *, replay: bool) -> str:
        """Name what changed according to the digests, followed by 'is' or 'are'; empty if nothing did."""
        compared = ("the optimizer",) if replay else DIGESTED
        known = zip(DIGESTED, self._known_digests, other._known_digests, strict=True)
        different = [name for name, old, new in known if name in compared and old != new and old and new]
        return f"{' and '.join(different)} {'is' if len(different) == 1 else 'are'}" if different else ""

    @property
    def _known_digests(self) -> list[str]:
        """The digest of each of `DIGESTED`, "" where the journal has none."""
        return [*(self.digests or ()), *[""] * len(DIGESTED)][: len(DIGESTED)]

    def _settings(self, other: "Header") -> dict[str, Any]:
        """The settings to compare with those of another header: functions without their names where both have digests."""
        pairs = zip(("sigma", "shaping"), self._known_digests[2:], other._known_digests[2:], strict=True)
        digested = {name for name, own, its in pairs if own and its}
        return {name: FUNCTION if name in digested else value for name, value in self.config.items()}


def read_copy(path: Path) -> Header | None:
    """Read the copy of the header of the journal `path`; None if it is missing or damaged."""
    try:
        return Header(**read_object(path.with_suffix(".header.json")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def write_copy(path: Path, header: Header) -> None:
    """Write the copy of the header of the journal `path`, unless it is there."""
    if read_copy(path) != header:
        write_object(path.with_suffix(".header.json"), dataclasses.asdict(header))


def _difference(name: str, stored: Any, given: Any) -> str:
    if isinstance(stored, dict) and isinstance(given, dict):
        names = [key for key in {**stored, **given} if stored.get(key) != given.get(key)]
        return ", ".join(f"{name} {key} is {stored.get(key)!r}, not {given.get(key)!r}" for key in names)
    if name == "plan":
        return f"plan {_difference_of_plans(stored, given)}"
    opaque = isinstance(stored, list) or name == "fingerprint"
    return f"{name} differs" if opaque else f"{name} is {stored!r}, not {given!r}"


def _difference_of_plans(stored: list[str], given: list[str]) -> str:
    """The first row that differs."""
    rows = zip([*stored, *[""] * len(given)], [*given, *[""] * len(stored)], strict=True)
    old, new = next((old, new) for old, new in rows if old != new)
    return f"has {f'the row {old!r}' if old else 'no row'}, not {f'the row {new!r}' if new else 'none'}"


def make_header(es: Strategy[S], state: S, *, recipe: Mapping | None = None) -> Header:
    """Make the header of a run from its initial state; ValueError if `es` has no plan and its fitness needs a batch."""
    try:
        plan = es.plan(state)
    except Exception as error:  # of a batch that is None, or of a strategy that has no fitness
        why = f"without a batch there is {type(error).__name__}: {error}"
        raise ValueError(f"a durable run needs the plan: call plan(state, batch) before it ({why})") from error
    options = {name: getattr(es, name) for name in ("population_size", "noise_reuse")}
    options |= {name: _as_json(getattr(es, name)) for name in ("precision", "sigma", "shaping", "perturbation")}
    key = [str(jax.random.key_impl(state.key)), np.asarray(jax.random.key_data(state.key)).tolist()]
    versions = {"jax": jax.__version__, "backend": jax.default_backend()}
    rows = [f"{leaf.path} {list(leaf.shape)} {leaf.dtype} {leaf.role} {leaf.spec} {_axes(leaf)}" for leaf in plan.leaves]
    return Header(
        key,
        options,
        rows,
        fingerprint(state.params),
        versions,
        dict(recipe) if recipe else None,
        update=UPDATE,
        digests=list(plan.digests),
        environments=[describe_environment(state)],
    )


def _axes(leaf: LeafPlan) -> str:
    """The axes of the noise in a parameter."""
    return " ".join(f"{name} {list(axes)}" for name, axes in zip(("stack", "rows", "columns"), leaf.axes, strict=True))


def _as_json(value: Any) -> Any:
    """A setting as a JSON value; functions, which have no stable text, by name."""
    if callable(value):
        return f"{FUNCTION}{getattr(value, '__name__', type(value).__name__)}"
    return value if isinstance(value, str | int | float) else repr(value)
