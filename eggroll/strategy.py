"""`EvolutionStrategy`: one generation from a one-member fitness function to an optax update.

    step = evaluate the population -> shape the fitness -> estimate the gradient -> optimizer update

`ask`/`tell` is the same path cut after the evaluation, for fitness that is computed outside JAX.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from eggroll.devices import sharded
from eggroll.devices.chunking import layout_in_budget
from eggroll.devices.mesh import Placement, of_outputs, of_report, of_update, place
from eggroll.lazy.planning import make_plan
from eggroll.noise import addresses
from eggroll.noise.plan import Plan
from eggroll.noise.rules import LowRank, Perturbation, check_params
from eggroll.population.evaluate import evaluate
from eggroll.population.fitness import member_arguments, normalised
from eggroll.population.layout import PopulationLayout
from eggroll.population.members import (
    Population,
    build_member,
    by_member,
    checked_coefficients,
    checked_fitness,
    of_params_and_batch,
)
from eggroll.population.metrics import FitnessReport, Metrics, of_valid, reduce_aux, report_fitness, valid_members
from eggroll.protocol import AskTell
from eggroll.settings import check_settings
from eggroll.state import ESState
from eggroll.update import estimator
from eggroll.update.parameters import UpdateReport, exact, initial, of_trained, reported, update
from eggroll.update.shaping import Shaping


@dataclasses.dataclass(frozen=True)
class EvolutionStrategy:
    """Evolution strategy with low-rank perturbations (EGGROLL, arXiv 2511.16652) over any JAX function.

    Args:
        fitness: `fitness(params, batch, key) -> scalar` of one member, higher is better; any JAX code. It may return a vector
            [K] over prompts or tasks, and `(fitness, aux)` when `aux` names a reduction. With a `member_state` given to
            `init` it takes that as a fourth argument and returns its new value last. None when only `ask`/`tell` is used.
        population_size: N, even, >= 2.
        sigma: standard deviation of one entry of the perturbation, > 0 (may be changed between generations by
            `state._replace(sigma=...)`), or a schedule from generation to it; None for `Integer` noise.
        optimizer: any optax transformation; it gets the negative of the ascent gradient; `threshold` for `Integer` noise.
        perturbation: `LowRank`, `Dense`, `Integer`, `Frozen`, or rules `[(path pattern, one of them), ...]`, first match wins.
        shaping: a name from `eggroll.SHAPINGS` or a function [N] -> [N].
        noise_reuse: generations that share the same noise, >= 1.
        members_per_batch: None: all members share `batch`; 1: `batch` has a leading axis of N; g: of N / g, consecutive
            groups of g members (even, dividing N) share one entry.
        chunk_size: members evaluated at a time (even), None: all, or what `memory_budget` allows.
        memory_budget: bytes of temporary memory of an evaluation, or "device": half of what is free; picks the chunk size.
        aux: how the aux of `fitness` is reduced over the population: "sum", "mean", "max", "min" or "all" (stacked, [N, ...]),
            or a tree prefix of those.
        precision: how parameters shorter than float32, quantised int8 ones among them, are updated: "master", "stochastic" or
            "nearest" (see `precision`).
        mesh: devices to run on, axes out of "population", "data", "model" (docs/scaling.md); chunks and budget are per device.
        shard_optimizer: keep the optimizer state in equal shares over the mesh axis "population".

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
    """

    fitness: Callable | None
    _: dataclasses.KW_ONLY
    population_size: int
    sigma: float | optax.Schedule | None
    optimizer: optax.GradientTransformation
    perturbation: Perturbation = LowRank()
    shaping: str | Shaping = "centered_ranks"
    noise_reuse: int = 1
    members_per_batch: int | None = None
    chunk_size: int | None = None
    memory_budget: int | Literal["device"] | None = None
    aux: Any = None
    precision: str = "master"
    mesh: Mesh | None = None
    shard_optimizer: bool = False
    _cache: dict = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def layout(self) -> PopulationLayout:
        """Layout of the population without a memory budget."""
        return PopulationLayout.of_members(self.population_size, self.members_per_batch, self.chunk_size)

    @functools.cached_property
    def placement(self) -> Placement | None:
        """Where a generation runs; None without a mesh."""
        return None if self.mesh is None else Placement(self.mesh, self.layout, self.shard_optimizer)

    def init(self, params: Any, *, key: Array, member_state: Any = None) -> ESState:
        """Make the state of a new run.

        Args:
            params: pytree of parameters.
            key: typed key from `jax.random.key`; kept for the whole run, do not use it elsewhere.
            member_state: initial carried state of ONE member, or None.

        Returns:
            `ESState` at generation 0.

        Raises:
            TypeError, ValueError: no array leaves, a leaf that is not an array or cannot be perturbed, a wrong key.
        """
        addresses.check_key(key)
        check_params(params, self.perturbation)
        params = jax.tree.map(jnp.asarray, params)
        masters, opt_state = initial(self.optimizer, params, self.perturbation, self.precision)
        per_member = jax.tree.map(lambda x: jnp.broadcast_to(x, (self.population_size // 2, 2, *jnp.shape(x))), member_state)
        sigma = self.sigma(jnp.int32(0)) if callable(self.sigma) else 1.0 if self.sigma is None else self.sigma
        state = ESState(params, opt_state, key, jnp.int32(0), jnp.float32(sigma), masters, per_member)
        return place(self.placement, state, None)[0]

    def plan(self, state: ESState, batch: Any = None, *, function: Callable | None = None) -> Plan:
        """Read the plan from one abstract trace; the first call fixes it for this strategy.

        Args:
            state: from `init`.
            batch: as for `step`; arrays or shapes.
            function: `function(params, batch)` to read instead of the fitness, for `ask`/`tell`.

        Returns:
            The `Plan`; `print(plan.table())` shows it.
        """
        if not isinstance(state, ESState):
            raise TypeError(f"state must be an ESState from init, got {type(state).__name__}.")
        if "plan" not in self._cache:
            self.layout.check_batch(batch)
            one_batch = self.layout.one_member(batch)
            args = (one_batch,) if function else member_arguments(one_batch, state.member_state)
            plan = make_plan(function or self._fitness(), state.params, *args, perturbation=self.perturbation)
            estimator.check_sums(plan, num_pairs=self.population_size // 2)
            self._cache["plan"] = plan
        self._cache["plan"].check(state.params)
        return self._cache["plan"]

    def step(self, state: ESState, batch: Any = None) -> tuple[ESState, Metrics]:
        """Run one generation.

        Args:
            state: from `init` or the last `step`.
            batch: any pytree the fitness takes; see `members_per_batch`.

        Returns:
            `(state, metrics)`. Compiled at the first call; a later sigma or generation does not recompile.
        """
        self.layout.check_batch(batch)
        self.plan(state, batch)
        if self.placement is not None:
            self.placement.check(self._fitness(), state, batch)
        self._layout_of("layout", self._fitness(), state, batch)
        state, batch = place(self.placement, state, batch, "split_batch")
        score = self._jitted("score", self._evaluate_and_score, of_report(self.placement))
        return self._finish(state, *score(state, batch))

    def ask(self, state: ESState) -> Population:
        """Return the population of this generation, for fitness that is computed outside JAX."""
        return Population(
            self.population_size,
            _apply=functools.partial(self._apply, state),
            _member=functools.partial(self._member, state),
        )

    def tell(self, state: ESState, fitness: Any, *, pairs: Any = None) -> tuple[ESState, Metrics]:
        """Finish the generation that `ask` began.

        Args:
            state: the state given to `ask`.
            fitness: [N] or [N, K] floats, member 2 p and 2 p + 1 being the signs +1 and -1 of pair p.
            pairs: ints [S], the pairs that the fitness [2 S] or [2 S, K] is of; None: all. The estimate stays unbiased
                when pairs are left out for reasons that have nothing to do with their fitness.

        Returns:
            `(state, metrics)`.

        Raises:
            ValueError: wrong length, unknown or repeated pairs, or no plan yet.
        """
        told = checked_fitness(fitness, pairs, population_size=self.population_size, integers=self.sigma is None)
        self._known_plan("tell")
        state, told = place(self.placement, state, told)
        return self._finish(state, *self._jitted("told", self._score_told, of_report(self.placement))(state, *told))

    def replay(self, state: ESState, coefficients: Any) -> ESState:
        """Repeat the update of a generation without evaluating anything.

        Args:
            state: before the generation.
            coefficients: float32 [P], its `Metrics.coefficients`.

        Returns:
            The state as `step` left it, bit for bit on the same backend; a carried `member_state` is not rebuilt.

        Raises:
            ValueError: wrong length, or no plan yet.
        """
        coefficients = checked_coefficients(coefficients, population_size=self.population_size)
        self._known_plan("replay")
        return self._move(*place(self.placement, state, coefficients))[0]

    def parameters(self, state: ESState) -> Any:
        """Return the parameters as the fitness takes them."""
        return state.params

    def _known_plan(self, needed_by: str) -> Plan:
        """Return the plan made before; ValueError when there is none yet."""
        if "plan" not in self._cache:
            raise ValueError(f"{needed_by} needs the plan: call ask(state).apply(fn, batch) or plan(state, batch, function=fn)")
        return self._cache["plan"]

    def _evaluate_and_score(self, state: ESState, batch: Any) -> tuple[FitnessReport, Any]:
        run = functools.partial(sharded.evaluate_fitness, placement=self.placement, aux=self.aux)
        fitness, aux, member_state = self.evaluate(self._fitness(), state, batch, layout=self._cache["layout"], run=run)
        return self._score(state, fitness.reshape(self.population_size, *fitness.shape[2:]), aux, member_state)

    def _score(self, state: ESState, fitness: Array, aux: Any, member_state: Any) -> tuple[FitnessReport, Any]:
        """Report the fitness, with the pair coefficients; and the member state, the old one for invalid members."""
        plan, valid = self._cache["plan"], valid_members(fitness)
        coefficients = estimator.coefficients_of(plan, self.shaping, fitness)
        report = report_fitness(fitness, coefficients, rank=plan.max_rank, aux=reduce_aux(self.aux, aux, valid))
        return report, of_valid(valid, member_state, state.member_state)

    def _score_told(self, state: ESState, fitness: Array, pairs: Array) -> tuple[FitnessReport, Any]:
        report, _ = self._score(state._replace(member_state=None), fitness, None, None)
        coefficients = estimator.of_all_pairs(self._cache["plan"], report.coefficients, pairs, num_pairs=self.layout.num_pairs)
        return report._replace(coefficients=coefficients), state.member_state

    def _finish(self, state: ESState, report: FitnessReport, member_state: Any) -> tuple[ESState, Metrics]:
        new_state, done = self._move(state, report.coefficients)
        member_state = jax.tree.map(lambda new, old: jnp.where(done.skipped, old, new), member_state, state.member_state)
        return new_state._replace(member_state=member_state), Metrics(state.generation, self._sigma(state), *report, *done)

    def evaluate(self, function: Callable, state: ESState, batch: Any, *, layout: PopulationLayout, run: Any = evaluate) -> Any:
        """Run `function(params, batch, key, member_state)` for every member; results have leading axes [P, 2]."""
        return run(
            function,
            self._cache["plan"],
            state.params,
            layout=layout,
            noise_key=state.key,
            noise_generation=state.generation // self.noise_reuse,
            sigma=self._sigma(state),
            evaluation_key=jax.random.fold_in(addresses.stream_key(state.key, 1), state.generation),
            batch=batch,
            member_state=state.member_state,
        )

    def _layout_of(self, name: Any, function: Callable, state: ESState, batch: Any) -> PopulationLayout:
        """The layout that a function is evaluated in, in chunks that fit `memory_budget`; found once."""
        how: dict[str, Any] = {"layout": self.layout, "budget": self.memory_budget, "placement": self.placement}
        run = functools.partial(self.evaluate, function)
        return self._once(name, lambda: layout_in_budget(run, state, batch, **how))

    def _apply(self, state: ESState, function: Callable, batch: Any) -> Any:
        self.plan(state, batch, function=function)
        state, one = state._replace(member_state=None), of_params_and_batch(function)
        layout = self._layout_of(("layout", function), one, state, batch)
        over = functools.partial(sharded.evaluate, placement=self.placement)
        run = by_member(functools.partial(self.evaluate, one, layout=layout, run=over))
        compiled = self._jitted(("apply", function), run, of_outputs(self.placement))
        return compiled(*place(self.placement, state, batch, "whole_batch"))

    def _member(self, state: ESState, index: Array | int) -> Any:
        draws = {"key": state.key, "generation": state.generation // self.noise_reuse, "sigma": self._sigma(state)}
        return build_member(self._known_plan("member"), state.params, index, **draws)

    def _update(self, state: ESState, coefficients: Array) -> tuple[ESState, Any]:
        optimizer = of_trained(self.optimizer, state.params, self.perturbation)
        more: dict[str, Any] = {"sigma": self._sigma(state), "noise_generation": state.generation // self.noise_reuse}
        more |= {"gradient": functools.partial(sharded.gradient, placement=self.placement), "precision": self.precision}
        new_state, report = update(self._cache["plan"], optimizer, state, coefficients, **more)
        new_state = new_state._replace(generation=state.generation + 1)
        return new_state._replace(sigma=self._sigma(new_state)), report

    def _sigma(self, state: ESState) -> Array:
        return jnp.asarray(self.sigma(state.generation), jnp.float32) if callable(self.sigma) else state.sigma

    def _move(self, state: ESState, coefficients: Array) -> tuple[ESState, UpdateReport]:
        """Update the parameters; a program of its own, so that `step`, `tell` and `replay` give the same bits."""
        plan, where = self._cache["plan"], of_update(self.placement, state)
        name = "update" if where is None else ("update", *jax.tree.leaves(where))
        state, done = self._jitted(name, self._update, where)(state, exact(plan, coefficients, self.shaping))
        return state, reported(plan, done)

    def _jitted(self, name: Any, function: Callable, out_shardings: Any = None) -> Callable:
        return self._once(name, lambda: jax.jit(function, out_shardings=out_shardings))

    def _once(self, name: Any, make: Callable[[], Any]) -> Any:
        if name not in self._cache:
            self._cache[name] = make()
        return self._cache[name]

    def _fitness(self) -> Callable:
        return normalised(self.fitness, has_aux=self.aux is not None, integers=self.sigma is None)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: with the plan, without compiled programs, and for one device."""
        kept = {name: value for name, value in self._cache.items() if name in ("plan", "layout")}
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "_"}
        return fields | {"mesh": None, "shard_optimizer": False, "_cache": kept}


_: type[AskTell[ESState]] = EvolutionStrategy  # checked by mypy
