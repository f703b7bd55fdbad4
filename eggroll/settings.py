"""The settings of an `EvolutionStrategy`, and their checks when it is constructed; `layout` and `mesh` check their own."""

import numbers
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from eggroll.generation import Settings
from eggroll.noise.rules import Frozen, Integer, Perturbation, is_integer, match_rules
from eggroll.population.layout import PopulationLayout
from eggroll.population.metrics import REDUCTIONS
from eggroll.update.feedback import Feedback
from eggroll.update.precision import PRECISIONS, is_low
from eggroll.update.shaping import INTEGER_SHAPINGS, SHAPINGS


class EvolutionSettings(Settings, Protocol):
    """Settings that are checked, in addition to those that the programs of a generation read."""

    @property
    def fitness(self) -> Callable | None:
        """Fitness of one member; None where only `ask` and `tell` are used."""

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """What turns the gradient estimate into an update."""

    @property
    def layout(self) -> PopulationLayout:
        """Layout of the population without a memory budget."""

    @property
    def chunk_size(self) -> int | None:
        """Members evaluated at a time."""

    @property
    def aux(self) -> Any:
        """How the aux of the fitness is reduced over the population."""

    @property
    def memory_budget(self) -> Any:
        """Bytes of temporary memory for the evaluation, "device" or None."""

    @property
    def mesh(self) -> Mesh | None:
        """Devices to run on; None: one device."""

    @property
    def shard_optimizer(self) -> bool:
        """Whether the optimizer's state is spread over the mesh."""


def check_settings(es: EvolutionSettings) -> None:
    """Raise TypeError or ValueError, naming the argument, unless the settings of a strategy are usable."""
    if es.fitness is not None and not callable(es.fitness):
        raise TypeError(f"fitness must be a function or None, got {type(es.fitness).__name__}.")
    _ = es.layout  # checks population_size, members_per_batch and chunk_size
    integers = is_integer(es.perturbation)
    if integers:
        _check_integers(es)
    is_number = isinstance(es.sigma, int | float | np.floating)
    if not integers and not callable(es.sigma) and not (is_number and 0 < es.sigma < float("inf")):
        raise ValueError(f"sigma must be a finite number > 0 or a schedule, got {es.sigma!r}.")
    if not hasattr(es.optimizer, "update"):
        raise TypeError(f"optimizer must be an optax transformation, got {type(es.optimizer).__name__}.")
    if es.shaping not in SHAPINGS if isinstance(es.shaping, str) else not callable(es.shaping):
        raise ValueError(f"shaping must be one of {', '.join(SHAPINGS)} or a function, got {es.shaping!r}.")
    if not isinstance(es.noise_reuse, numbers.Integral) or es.noise_reuse < 1:
        raise ValueError(f"noise_reuse must be an integer >= 1, got {es.noise_reuse!r}.")
    if es.precision not in PRECISIONS and not isinstance(es.precision, Feedback):
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, or a Feedback, got {es.precision!r}.")
    for name in jax.tree.leaves(es.aux):
        if name not in REDUCTIONS:
            raise ValueError(f"aux must name reductions out of {', '.join(REDUCTIONS)}, got {name!r}.")
    budget = es.memory_budget
    if budget not in (None, "device") and not (isinstance(budget, int | np.integer) and budget > 0):
        raise ValueError(f"memory_budget must be bytes > 0, 'device' or None, got {budget!r}.")
    if budget is not None and es.chunk_size is not None:
        raise ValueError("memory_budget has no effect with chunk_size, which takes its place; give one of them.")
    if es.aux is not None and es.fitness is None:
        raise ValueError("aux has no effect without a fitness function, whose aux it reduces; leave it out.")
    if es.mesh is None and es.shard_optimizer:
        raise ValueError("shard_optimizer needs a mesh with the axis 'population', got no mesh.")
    _ = es.placement  # checks the mesh


def _check_integers(es: EvolutionSettings) -> None:
    if es.sigma is not None:
        raise ValueError(f"sigma must be None for int8 parameters, whose Integer(shift=...) sets it, got {es.sigma!r}.")
    if es.shaping not in INTEGER_SHAPINGS:
        raise ValueError(f"shaping must be one of {', '.join(INTEGER_SHAPINGS)} for int8 parameters, got {es.shaping!r}.")
    if es.mesh is not None and getattr(es.mesh, "shape", {}).get("data", 1) > 1:
        raise ValueError("mesh axis 'data' averages the fitness, which int8 parameters do not; use 'population' alone.")


def check_precision(precision: str | Feedback, params: Any, perturbation: Perturbation) -> None:
    """Raise ValueError if a precision was chosen and no parameter that evolves is rounded in an update."""
    specs = match_rules(perturbation, params)
    evolve = [leaf for leaf, spec in zip(jax.tree.leaves(params), specs, strict=True) if not isinstance(spec, Frozen | Integer)]
    int8 = any(leaf.dtype == jnp.int8 for leaf in evolve)
    if isinstance(precision, Feedback) and not int8:
        raise ValueError(f"precision {precision!r} has no effect: no parameter that evolves is quantised; leave it out.")
    if precision != PRECISIONS[0] and not int8 and not any(map(is_low, evolve)):
        raise ValueError(
            f"precision {precision!r} has no effect: no parameter that evolves is quantised or shorter than float32; "
            "leave it out."
        )
