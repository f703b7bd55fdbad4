"""`EvolutionStrategy`: one generation from a one-member fitness function to an optax update.

    step = evaluate the population -> shape the fitness -> estimate the gradient -> optimizer update

`ask`/`tell` is the same path cut after the evaluation, for fitness that is computed outside JAX.
"""

import dataclasses
import functools
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from eggroll import estimator, noise
from eggroll.chunking import layout_in_budget
from eggroll.fitness import member_arguments, normalised
from eggroll.members import Population
from eggroll.metrics import REDUCTIONS, FitnessReport, Metrics, of_valid, reduce_aux, report_fitness, valid_members
from eggroll.plan import Plan, make_plan
from eggroll.population import PopulationLayout, draw_pair, evaluate, member_params
from eggroll.precision import PRECISIONS, float32_params, init_masters
from eggroll.rules import LowRank, Perturbation, check_params, check_perturbation, trainable
from eggroll.shaping import SHAPINGS, Shaping, shaped_fitness
from eggroll.state import ESState
from eggroll.update import UpdateReport, update


@dataclasses.dataclass(frozen=True)
class EvolutionStrategy:
    """Evolution strategy with low-rank perturbations (EGGROLL, arXiv 2511.16652) over any JAX function.

    Args:
        fitness: `fitness(params, batch, key) -> scalar` of one member, higher is better; any JAX code. It may return a vector
            [K] over prompts or tasks, and `(fitness, aux)` when `aux` names a reduction. With a `member_state` given to
            `init` it takes that as a fourth argument and returns its new value last. None when only `ask`/`tell` is used.
        population_size: N, even, >= 2.
        sigma: standard deviation of one entry of the perturbation, > 0, or a schedule from generation to it; a number may be
            changed between generations by `state._replace(sigma=...)`, a schedule takes its place.
        optimizer: any optax transformation; it gets the negative of the ascent gradient, and the parameters.
        perturbation: `LowRank`, `Dense` or `Frozen`, or rules `[(path pattern, one of them), ...]`, first match wins.
        shaping: a name from `eggroll.SHAPINGS` or a function [N] -> [N].
        noise_reuse: generations that share the same noise, >= 1.
        members_per_batch: None: all members share `batch`; 1: `batch` has a leading axis of N; g: of N / g, consecutive
            groups of g members (even, dividing N) share one entry.
        chunk_size: members evaluated at a time (even), None: all, or what `memory_budget` allows.
        memory_budget: bytes of temporary memory that an evaluation may use; picks the chunk size.
        aux: how the aux of `fitness` is reduced over the population: "sum", "mean", "max", "min" or "all" (stacked, [N, ...]),
            or a tree prefix of those.
        precision: how parameters shorter than float32 are updated: "master", "stochastic" or "nearest" (see `precision`).

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
    """

    fitness: Callable | None
    _: dataclasses.KW_ONLY
    population_size: int
    sigma: float | optax.Schedule
    optimizer: optax.GradientTransformation
    perturbation: Perturbation = LowRank()
    shaping: str | Shaping = "centered_ranks"
    noise_reuse: int = 1
    members_per_batch: int | None = None
    chunk_size: int | None = None
    memory_budget: int | None = None
    aux: Any = None
    precision: str = "master"
    _cache: dict = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.fitness is not None and not callable(self.fitness):
            raise TypeError(f"fitness must be a function or None, got {type(self.fitness).__name__}.")
        _ = self.layout  # checks population_size, members_per_batch and chunk_size
        is_number = isinstance(self.sigma, int | float | np.floating)
        if not callable(self.sigma) and not (is_number and 0 < self.sigma < float("inf")):
            raise ValueError(f"sigma must be a finite number > 0 or a schedule, got {self.sigma!r}.")
        if not hasattr(self.optimizer, "update"):
            raise TypeError(f"optimizer must be an optax transformation, got {type(self.optimizer).__name__}.")
        if self.shaping not in SHAPINGS if isinstance(self.shaping, str) else not callable(self.shaping):
            raise ValueError(f"shaping must be one of {', '.join(SHAPINGS)} or a function, got {self.shaping!r}.")
        if not isinstance(self.noise_reuse, numbers.Integral) or self.noise_reuse < 1:
            raise ValueError(f"noise_reuse must be an integer >= 1, got {self.noise_reuse!r}.")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}.")
        for name in jax.tree.leaves(self.aux):
            if name not in REDUCTIONS:
                raise ValueError(f"aux must name reductions out of {', '.join(REDUCTIONS)}, got {name!r}.")
        check_perturbation(self.perturbation)

    @property
    def layout(self) -> PopulationLayout:
        """Layout of the population without a memory budget."""
        return PopulationLayout.of_members(self.population_size, self.members_per_batch, self.chunk_size)

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
        noise.check_key(key)
        check_params(params, self.perturbation)
        params = jax.tree.map(jnp.asarray, params)
        masters = init_masters(params, self.precision)
        per_member = jax.tree.map(lambda x: jnp.broadcast_to(x, (self.population_size // 2, 2, *jnp.shape(x))), member_state)
        generation = jnp.int32(0)
        return ESState(
            params,
            self._optimizer(params).init(float32_params(params, masters)),
            key,
            generation,
            jnp.asarray(self.sigma(generation) if callable(self.sigma) else self.sigma, jnp.float32),
            masters,
            per_member,
        )

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
            self._cache["plan"] = make_plan(function or self._fitness(), state.params, *args, perturbation=self.perturbation)
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
        if self.memory_budget is not None and self.chunk_size is None and "layout" not in self._cache:
            run = functools.partial(self.evaluate, self._fitness())
            self._cache["layout"] = layout_in_budget(run, state, batch, layout=self.layout, budget=self.memory_budget)
        return self._finish(state, *self._jitted("score", self._evaluate_and_score)(state, batch))

    def ask(self, state: ESState) -> Population:
        """Return the population of this generation, for fitness that is computed outside JAX."""
        return Population(
            self.population_size,
            _apply=functools.partial(self._apply, state),
            _member=functools.partial(self._member, state),
        )

    def tell(self, state: ESState, fitness: Any) -> tuple[ESState, Metrics]:
        """Finish the generation that `ask` began.

        Args:
            state: the state given to `ask`.
            fitness: [N] or [N, K] floats, member 2 p and 2 p + 1 being the signs +1 and -1 of pair p.

        Returns:
            `(state, metrics)`.

        Raises:
            ValueError: wrong length, or no plan yet (nothing was applied).
        """
        fitness, size = jnp.asarray(fitness, jnp.float32), self.population_size
        if fitness.ndim not in (1, 2) or fitness.shape[0] != size:
            raise ValueError(f"fitness must have shape ({size},) or ({size}, K), got {fitness.shape}.")
        self._known_plan("tell")
        return self._finish(state, *self._jitted("told", self._score)(state, fitness, None, state.member_state))

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
        coefficients = jnp.asarray(coefficients, jnp.float32)
        if coefficients.shape != (self.population_size // 2,):
            raise ValueError(f"coefficients must have shape ({self.population_size // 2},), got {coefficients.shape}.")
        self._known_plan("replay")
        return self._jitted("update", self._update)(state, coefficients)[0]

    def _known_plan(self, needed_by: str) -> Plan:
        """Return the plan made before; ValueError when there is none yet."""
        if "plan" not in self._cache:
            raise ValueError(
                f"{needed_by} needs the plan; call ask(state).apply(fn, batch) or plan(state, batch, function=fn) first."
            )
        return self._cache["plan"]

    def _evaluate_and_score(self, state: ESState, batch: Any) -> tuple[FitnessReport, Any]:
        fitness, aux, member_state = self.evaluate(self._fitness(), state, batch, layout=self._cache.get("layout", self.layout))
        return self._score(state, fitness.reshape(self.population_size, *fitness.shape[2:]), aux, member_state)

    def _score(self, state: ESState, fitness: Array, aux: Any, member_state: Any) -> tuple[FitnessReport, Any]:
        """Report the fitness, with the pair coefficients; and the member state, the old one for invalid members."""
        valid = valid_members(fitness)
        coefficients = estimator.pair_coefficients(shaped_fitness(self.shaping, fitness))
        rank = self._cache["plan"].max_rank
        report = report_fitness(fitness, coefficients, rank=rank, aux=reduce_aux(self.aux, aux, valid))
        return report, of_valid(valid, member_state, state.member_state)

    def _finish(self, state: ESState, report: FitnessReport, member_state: Any) -> tuple[ESState, Metrics]:
        """Update the parameters; a program of its own, so that `step`, `tell` and `replay` give the same bits."""
        new_state, done = self._jitted("update", self._update)(state, report.coefficients)
        member_state = jax.tree.map(lambda new, old: jnp.where(done.skipped, old, new), member_state, state.member_state)
        metrics = Metrics(state.generation, self._sigma(state), *report, *done)
        return new_state._replace(member_state=member_state), metrics

    def evaluate(self, function: Callable, state: ESState, batch: Any, *, layout: PopulationLayout) -> Any:
        """Run `function(params, batch, key, member_state)` for every member; results have leading axes [P, 2]."""
        evaluation_key = noise.stream_key(state.key, 1)
        return evaluate(
            function,
            self._cache["plan"],
            state.params,
            layout=layout,
            noise_key=state.key,
            noise_generation=self._noise_generation(state),
            sigma=self._sigma(state),
            evaluation_key=jax.random.fold_in(evaluation_key, state.generation),
            batch=batch,
            member_state=state.member_state,
        )

    def _apply(self, state: ESState, function: Callable, batch: Any) -> Any:
        self.plan(state, batch, function=function)

        def run(state, batch):
            layout, stateless = self.layout, state._replace(member_state=None)
            outputs = self.evaluate(lambda params, batch, key, _: function(params, batch), stateless, batch, layout=layout)
            return jax.tree.map(lambda x: x.reshape(self.population_size, *x.shape[2:]), outputs)

        return self._jitted(("apply", function), run)(state, batch)

    def _member(self, state: ESState, index: Array | int) -> Any:
        plan = self._known_plan("member")
        pair, is_minus = jnp.divmod(jnp.asarray(index, jnp.int32), 2)
        drawn = draw_pair(plan, state.key, self._noise_generation(state), pair)
        sign = 1.0 - 2.0 * is_minus.astype(jnp.float32)
        return member_params(plan, state.params, drawn, sign=sign, sigma=self._sigma(state), lazy=False)

    def _update(self, state: ESState, coefficients: Array) -> tuple[ESState, UpdateReport]:
        plan, optimizer, noise_generation = self._cache["plan"], self._optimizer(state.params), self._noise_generation(state)
        more = {"sigma": self._sigma(state), "noise_generation": noise_generation}
        new_state, report = update(plan, optimizer, state, coefficients, **more, precision=self.precision)
        new_state = new_state._replace(generation=state.generation + 1)
        return new_state._replace(sigma=self._sigma(new_state)), report

    def _noise_generation(self, state: ESState) -> Array:
        return state.generation // self.noise_reuse

    def _sigma(self, state: ESState) -> Array:
        return jnp.asarray(self.sigma(state.generation), jnp.float32) if callable(self.sigma) else state.sigma

    def _optimizer(self, params: Any) -> optax.GradientTransformation:
        """The user's optimizer, restricted to the parameters that are not frozen."""
        mask = trainable(params, self.perturbation)
        if all(jax.tree.leaves(mask)):
            return self.optimizer
        labels = jax.tree.map(lambda trained: "trained" if trained else "frozen", mask)
        return optax.multi_transform({"trained": self.optimizer, "frozen": optax.set_to_zero()}, labels)

    def _jitted(self, name: Any, function: Callable) -> Callable:
        if name not in self._cache:
            self._cache[name] = jax.jit(function)
        return self._cache[name]

    def _fitness(self) -> Callable:
        if self.fitness is None:
            raise ValueError("fitness is None; give EvolutionStrategy a fitness function, or use ask and tell.")
        return normalised(self.fitness, has_aux=self.aux is not None)
