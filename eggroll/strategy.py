"""`EvolutionStrategy`: one generation from a one-member fitness function to an optax update.

    step = evaluate the population -> shape the fitness -> estimate the gradient -> optimizer update

`ask`/`tell` is the same path cut after the evaluation, for fitness that is computed outside JAX.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from eggroll import estimator, noise
from eggroll.chunking import pairs_in_budget
from eggroll.plan import LowRank, Perturbation, Plan, check_params, check_perturbation, make_plan, trainable
from eggroll.population import PopulationLayout, draw_pair, evaluate, member_params
from eggroll.precision import PRECISIONS, Masters, apply_updates, float32_params, init_masters
from eggroll.shaping import SHAPINGS, Shaping

REDUCTIONS = ("sum", "mean", "max", "min", "all")


class ESState(NamedTuple):
    """State of a run: a pytree that jits, scans and saves as it is."""

    params: Any  # the user's pytree, in its storage dtypes
    opt_state: Any  # of the optax transformation, float32
    key: Array  # typed threefry key of the run, never changes
    generation: Array  # int32 []
    sigma: Array  # float32 [], standard deviation of the next generation
    masters: Masters  # float32 copies of low-precision parameters, or None
    member_state: Any  # [P, 2, ...] carried per member, or None


class Metrics(NamedTuple):
    """What one generation reports; statistics are over the members whose fitness is finite."""

    generation: Array  # int32 [], the generation just done
    mean_fitness: Array  # float32 []
    best_fitness: Array  # float32 []
    std_fitness: Array  # float32 []
    invalid: Array  # int32 [], members whose fitness was not finite
    skipped: Array  # bool [], True when every member was invalid and nothing changed
    gradient_norm: Array  # float32 []
    sigma: Array  # float32 []
    fitness: Array  # float32 [N] or [N, K], raw
    aux: Any  # reduced over the valid members, or None


@dataclasses.dataclass(frozen=True)
class EvolutionStrategy:
    """Evolution strategy with low-rank perturbations (EGGROLL, arXiv 2511.16652) over any JAX function.

    Args:
        fitness: `fitness(params, batch, key) -> scalar` of one member, higher is better; any JAX code. It may return a vector
            [K] over prompts or tasks, and `(fitness, aux)` when `aux` names a reduction. With a `member_state` given to
            `init` it takes that as a fourth argument and returns its new value last. None when only `ask`/`tell` is used.
        population_size: N, even, >= 2.
        sigma: standard deviation of one entry of the perturbation, > 0, or a schedule from generation to it.
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
        _check_population(self.population_size, self.members_per_batch, self.chunk_size)
        if not callable(self.sigma) and not (isinstance(self.sigma, int | float) and 0 < self.sigma < float("inf")):
            raise ValueError(f"sigma must be a finite number > 0 or a schedule, got {self.sigma!r}.")
        if not hasattr(self.optimizer, "update"):
            raise TypeError(f"optimizer must be an optax transformation, got {type(self.optimizer).__name__}.")
        if isinstance(self.shaping, str) and self.shaping not in SHAPINGS:
            raise ValueError(f"shaping must be one of {', '.join(SHAPINGS)} or a function, got {self.shaping!r}.")
        if not isinstance(self.noise_reuse, int) or self.noise_reuse < 1:
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
        chunk_pairs = None if self.chunk_size is None else self.chunk_size // 2
        return PopulationLayout(self.population_size // 2, self.members_per_batch, chunk_pairs)

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
        check_params(params)
        params = jax.tree.map(jnp.asarray, params)
        masters = init_masters(params, self.precision)
        per_member = jax.tree.map(
            lambda x: jnp.broadcast_to(x, (self.population_size // 2, 2, *jnp.shape(x))), member_state
        )
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
        if "plan" not in self._cache:
            self.layout.check_batch(batch)
            args = (self.layout.one_member(batch),) if function else (*self._member_args(state, batch),)
            made, out_shape = make_plan(
                function or self._require_fitness(), state.params, *args, perturbation=self.perturbation
            )
            if function is None:
                self._check_result(out_shape, state)
            self._cache["plan"] = made
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
        self._require_fitness()
        self.layout.check_batch(batch)
        self.plan(state, batch)
        if "layout" not in self._cache:
            self._cache["layout"] = self._budgeted_layout(state, batch)
        return self._jitted("step", self._step)(state, batch)

    def ask(self, state: ESState) -> "Population":
        """Return the population of this generation, for fitness that is computed outside JAX."""
        return Population(self, state)

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
        fitness = jnp.asarray(fitness, jnp.float32)
        if fitness.ndim not in (1, 2) or fitness.shape[0] != self.population_size:
            raise ValueError(f"fitness must have shape ({self.population_size},) or ({self.population_size}, K), got {fitness.shape}.")
        if "plan" not in self._cache:
            raise ValueError("tell needs the plan: call ask(state).apply(fn, batch) or plan(state, batch, function=fn) first.")
        return self._jitted("tell", self._update)(state, fitness, None, state.member_state)

    # --- the path of one generation -----------------------------------------------------------------------------------

    def _step(self, state: ESState, batch: Any) -> tuple[ESState, Metrics]:
        outputs = self.evaluate(self._normalised, state, batch, layout=self._cache["layout"])
        fitness, aux, member_state = outputs
        flat = fitness.reshape(self.population_size, *fitness.shape[2:])
        return self._update(state, flat, aux, member_state)

    def evaluate(
        self, function: Callable, state: ESState, batch: Any, *, layout: PopulationLayout, member_state: bool = True
    ) -> Any:
        """Run `function(params, batch, key, member_state)` for every member; results have leading axes [P, 2]."""
        noise_key, evaluation_key, _ = jax.random.split(state.key, 3)
        return evaluate(
            function,
            self._cache["plan"],
            state.params,
            layout=layout,
            noise_key=noise_key,
            noise_generation=state.generation // self.noise_reuse,
            sigma=self._sigma(state),
            evaluation_key=jax.random.fold_in(evaluation_key, state.generation),
            batch=batch,
            member_state=state.member_state if member_state else None,
        )

    def _update(self, state: ESState, fitness: Array, aux: Any, member_state: Any) -> tuple[ESState, Metrics]:
        noise_key, _, rounding_key = jax.random.split(state.key, 3)
        sigma = self._sigma(state)
        shape = SHAPINGS[self.shaping] if isinstance(self.shaping, str) else self.shaping
        ascent = estimator.gradient(
            self._cache["plan"],
            estimator.pair_coefficients(shape(fitness).astype(jnp.float32)),
            noise_key=noise_key,
            noise_generation=state.generation // self.noise_reuse,
            sigma=sigma,
        )
        wide = float32_params(state.params, state.masters)
        descent = jax.tree.map(jnp.negative, ascent)  # optax minimises: the only negation
        updates, opt_state = self._optimizer(state.params).update(descent, state.opt_state, wide)
        params, masters = apply_updates(
            state.params, state.masters, self._only_trainable(updates, state.params), precision=self.precision,
            key=jax.random.fold_in(rounding_key, state.generation),
        )  # fmt: skip
        valid = jnp.isfinite(fitness).reshape(fitness.shape[0], -1).all(axis=1)
        changed = state._replace(params=params, opt_state=opt_state, masters=masters, member_state=member_state)
        kept = jax.tree.map(lambda new, old: jnp.where(valid.any(), new, old), changed, state)
        new_state = kept._replace(generation=state.generation + 1)
        new_state = new_state._replace(sigma=self._sigma(new_state))
        metrics = _metrics(state, fitness, valid, sigma, optax.global_norm(ascent), self._reduced(aux, valid))
        return new_state, metrics

    # --- parts ----------------------------------------------------------------------------------------------------------

    def _sigma(self, state: ESState) -> Array:
        return jnp.asarray(self.sigma(state.generation), jnp.float32) if callable(self.sigma) else state.sigma

    def _optimizer(self, params: Any) -> optax.GradientTransformation:
        mask = trainable(params, self.perturbation)
        return self.optimizer if all(jax.tree.leaves(mask)) else optax.masked(self.optimizer, mask)

    def _only_trainable(self, updates: Any, params: Any) -> Any:
        mask = trainable(params, self.perturbation)
        return jax.tree.map(lambda update, keep: update if keep else jnp.zeros_like(update), updates, mask)

    def _jitted(self, name: Any, function: Callable) -> Callable:
        if name not in self._cache:
            self._cache[name] = jax.jit(function)
        return self._cache[name]

    def _require_fitness(self) -> Callable:
        if self.fitness is None:
            raise ValueError("fitness is None; give EvolutionStrategy a fitness function, or use ask and tell.")
        return self.fitness

    def _normalised(self, params: Any, batch: Any, key: Array, member_state: Any) -> tuple[Array, Any, Any]:
        """The user's fitness with one result shape: (float32 fitness, aux or None, member state or None)."""
        result = self._require_fitness()(params, batch, key, *(() if member_state is None else (member_state,)))
        parts = list(result) if isinstance(result, tuple) else [result]
        aux = parts.pop(1) if self.aux is not None else None
        return parts[0].astype(jnp.float32), aux, parts[1] if member_state is not None else None

    def _member_args(self, state: ESState, batch: Any) -> tuple:
        args = (self.layout.one_member(batch), jax.eval_shape(lambda: jax.random.key(0)))
        if state.member_state is None:
            return args
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[2:], x.dtype), state.member_state)
        return (*args, one)

    def _check_result(self, result: Any, state: ESState) -> None:
        expected = ["fitness"] + ["aux"] * (self.aux is not None) + ["member_state"] * (state.member_state is not None)
        parts = list(result) if isinstance(result, tuple) else [result]
        if len(parts) != len(expected):
            raise ValueError(
                f"fitness must return ({', '.join(expected)}) here, got {len(parts)} values; `aux` names the reduction of an "
                "aux, `init(member_state=...)` gives a carried state."
            )
        fitness = parts[0]
        if not hasattr(fitness, "dtype") or not jnp.issubdtype(fitness.dtype, jnp.floating) or len(fitness.shape) > 1:
            described = f"{fitness.dtype}{list(fitness.shape)}" if hasattr(fitness, "dtype") else type(fitness).__name__
            raise ValueError(f"fitness must return a float scalar, or a float vector over prompts or tasks, got {described}.")
        if self.shaping == "group_relative" and len(fitness.shape) != 1:
            raise ValueError(
                "shaping 'group_relative' needs a fitness vector [K]; for a scalar pass "
                "functools.partial(eggroll.group_relative, group_size=g)."
            )

    def _budgeted_layout(self, state: ESState, batch: Any) -> PopulationLayout:
        if self.memory_budget is None or self.chunk_size is not None:
            return self.layout

        def evaluate(state, batch, layout):
            return self.evaluate(self._normalised, state, batch, layout=layout)

        pairs = pairs_in_budget(evaluate, state, batch, layout=self.layout, budget=self.memory_budget)
        return dataclasses.replace(self.layout, chunk_pairs=pairs)

    def _reduced(self, aux: Any, valid: Array) -> Any:
        if self.aux is None or aux is None:
            return None

        def reduce(name, subtree):
            return jax.tree.map(lambda x: _reduce(name, x.reshape(valid.shape[0], *x.shape[2:]), valid), subtree)

        return jax.tree.map(reduce, self.aux, aux)


@dataclasses.dataclass(frozen=True)
class Population:
    """The members of one generation as addresses; made by `EvolutionStrategy.ask`."""

    strategy: EvolutionStrategy
    state: ESState

    def apply(self, function: Callable, batch: Any = None) -> Any:
        """Apply `function(params, batch)` under every member's perturbation.

        Args:
            function: any JAX function; pass the same object every generation, it is compiled once per object.
            batch: pytree, shared by the members or not as the strategy's `members_per_batch` says.

        Returns:
            The results with a leading axis of N.
        """
        strategy, state = self.strategy, self.state
        layout = strategy.layout
        layout.check_batch(batch)
        strategy.plan(state, batch, function=function)

        def run(state, batch):
            outputs = strategy.evaluate(
                lambda params, batch, key, member_state: function(params, batch), state, batch, layout=layout, member_state=False
            )
            return jax.tree.map(lambda x: x.reshape(strategy.population_size, *x.shape[2:]), outputs)

        return strategy._jitted(("apply", function), run)(state, batch)

    def member(self, index: Array | int) -> Any:
        """Build the parameters of one member, index in [0, N); vmap it for a materialised population."""
        strategy, state = self.strategy, self.state
        if "plan" not in strategy._cache:
            raise ValueError("member needs the plan: call apply(fn, batch) or strategy.plan(state, batch) first.")
        made = strategy._cache["plan"]
        noise_key, _, _ = jax.random.split(state.key, 3)
        pair = jnp.asarray(index, jnp.int32) // 2
        drawn = draw_pair(made, noise_key, state.generation // strategy.noise_reuse, pair)
        sign = 1.0 - 2.0 * (jnp.asarray(index, jnp.int32) % 2).astype(jnp.float32)
        return member_params(made, state.params, drawn, sign=sign, sigma=strategy._sigma(state), lazy=False)


def paper_learning_rate(learning_rate: float, *, sigma: float, population_size: int) -> float:
    """Convert a step size of the EGGROLL paper's code to one for `optax.sgd` here.

    That code steps by lr sigma / sqrt(N) sum_i s_i f_i E_i, which is lr sigma^2 sqrt(N) times this library's gradient.

    Args:
        learning_rate: the paper's `lr_scale`, with z-scored fitness.
        sigma: standard deviation of the perturbation.
        population_size: N.

    Returns:
        learning_rate * sigma^2 * sqrt(population_size).
    """
    return learning_rate * sigma**2 * population_size**0.5


def _check_population(population_size: Any, members_per_batch: Any, chunk_size: Any) -> None:
    if not isinstance(population_size, int) or population_size < 2 or population_size % 2:
        raise ValueError(f"population_size must be an even integer >= 2 (antithetic pairs), got {population_size!r}.")
    g = members_per_batch
    if g is not None and not (isinstance(g, int) and g >= 1 and (g == 1 or g % 2 == 0) and population_size % g == 0):
        raise ValueError(f"members_per_batch must be None, 1 or even and divide population_size {population_size}, got {g!r}.")
    if chunk_size is not None and not (isinstance(chunk_size, int) and chunk_size >= 2 and chunk_size % 2 == 0):
        raise ValueError(f"chunk_size must be an even integer >= 2 or None, got {chunk_size!r}.")


def _reduce(name: str, values: Array, valid: Array) -> Array:
    """Reduce [N, ...] over the members whose fitness is finite."""
    if name == "all":
        return values
    mask = valid.reshape(-1, *([1] * (values.ndim - 1)))
    if name in ("sum", "mean"):
        total = jnp.where(mask, values, jnp.zeros_like(values)).sum(axis=0)
        return total if name == "sum" else total / jnp.maximum(valid.sum(), 1).astype(jnp.float32)
    limits = jnp.finfo(values.dtype) if jnp.issubdtype(values.dtype, jnp.floating) else jnp.iinfo(values.dtype)
    if name == "max":
        return jnp.where(mask, values, jnp.asarray(limits.min, values.dtype)).max(axis=0)
    return jnp.where(mask, values, jnp.asarray(limits.max, values.dtype)).min(axis=0)


def _metrics(state: ESState, fitness: Array, valid: Array, sigma: Array, norm: Array, aux: Any) -> Metrics:
    scores = fitness.reshape(fitness.shape[0], -1).mean(axis=1)
    count = jnp.maximum(valid.sum(), 1).astype(jnp.float32)
    mean = jnp.where(valid, scores, 0.0).sum() / count
    variance = jnp.where(valid, (scores - mean) ** 2, 0.0).sum() / count
    nothing = jnp.float32(jnp.nan)
    return Metrics(
        generation=state.generation,
        mean_fitness=jnp.where(valid.any(), mean, nothing),
        best_fitness=jnp.where(valid.any(), jnp.where(valid, scores, -jnp.inf).max(), nothing),
        std_fitness=jnp.sqrt(variance),
        invalid=(~valid).sum(),
        skipped=~valid.any(),
        gradient_norm=norm,
        sigma=sigma,
        fitness=fitness,
        aux=aux,
    )
