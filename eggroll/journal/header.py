"""The header of a journal: which run it is of."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from eggroll.journal.fingerprint import fingerprint
from eggroll.noise.plan import LeafPlan
from eggroll.state import ESState
from eggroll.strategy import EvolutionStrategy

VERSION = 2  # of the format of the file; 2: the plan says how the noise lies in a parameter


class JournalError(ValueError):
    """A journal cannot be read, or belongs to another run; the message says which and where."""


@dataclasses.dataclass(frozen=True)
class Header:
    """What a journal says about its run; JSON values."""

    key: list  # implementation and words of the run's key
    config: dict  # options of the strategy
    plan: list  # a line per parameter
    fingerprint: str  # SHA-256 of the initial parameters
    versions: dict  # of the software that wrote it; may differ
    recipe: dict | None = None  # {"function": "module:name", "options": ...}: what makes (strategy, initial state) again
    version: int = VERSION

    def check(self, other: "Header") -> None:
        """Raise JournalError when `other` is of another run, naming the fields; versions and recipe may differ."""
        for name in ("version", "key", "config", "plan", "fingerprint"):
            mine, its = getattr(self, name), getattr(other, name)
            if mine != its:
                raise JournalError(f"the journal is of another run: its {_difference(name, mine, its)}.")


def _difference(name: str, mine: Any, its: Any) -> str:
    if isinstance(mine, dict) and isinstance(its, dict):
        names = [key for key in {**mine, **its} if mine.get(key) != its.get(key)]
        return ", ".join(f"{name} {key} is {mine.get(key)!r}, not {its.get(key)!r}" for key in names)
    return f"{name} differs" if isinstance(mine, list) or name == "fingerprint" else f"{name} is {mine!r}, not {its!r}"


def make_header(es: EvolutionStrategy, state: ESState, *, recipe: Mapping | None = None) -> Header:
    """Make the header of a run from its initial state; `es` has its plan already."""
    plan = es.plan(state)
    options = {name: getattr(es, name) for name in ("population_size", "noise_reuse", "precision")}
    options |= {name: _said(getattr(es, name)) for name in ("sigma", "shaping", "perturbation")}
    key = [str(jax.random.key_impl(state.key)), np.asarray(jax.random.key_data(state.key)).tolist()]
    versions = {"jax": jax.__version__, "backend": jax.default_backend()}
    rows = [f"{leaf.path} {list(leaf.shape)} {leaf.dtype} {leaf.role} {leaf.spec} {_axes(leaf)}" for leaf in plan.leaves]
    return Header(key, options, rows, fingerprint(state.params), versions, dict(recipe) if recipe else None)


def _axes(leaf: LeafPlan) -> str:
    """How the noise lies in the parameter."""
    return " ".join(f"{name} {list(getattr(leaf, name))}" for name in ("stack", "rows", "columns"))


def _said(value: Any) -> Any:
    """An option as the header holds it; functions, which have no stable text, by their name."""
    if callable(value):
        return f"function {getattr(value, '__name__', type(value).__name__)}"
    return value if isinstance(value, str | int | float) else repr(value)
