"""`EvolutionStrategy`: one generation from a one-member fitness function to an optax update.

    step = evaluate the population -> shape the fitness -> estimate the gradient -> optimizer update

`ask`/`tell` is the same path cut after the evaluation, for fitness that is computed outside JAX.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from eggroll import generation, programs
from eggroll.devices.chunking import layout_in_budget
from eggroll.devices.mesh import Placement, output_shardings, replicated, report_shardings, shard_inputs
from eggroll.lazy.planning import make_plan
from eggroll.noise import addresses
from eggroll.noise.plan import Plan
from eggroll.noise.rules import LowRank, Perturbation, check_params
from eggroll.plans import checked_plan, known_plan
from eggroll.population.fitness import member_arguments, normalise_fitness
from eggroll.population.layout import PopulationLayout
from eggroll.population.members import Population, build_member, check_coefficients
from eggroll.population.metrics import FitnessReport, Metrics
from eggroll.protocol import AskTell
from eggroll.settings import check_precision, check_settings
from eggroll.state import ESState, begin, check_not_consumed, check_state
from eggroll.update import estimator
from eggroll.update.feedback import Feedback
from eggroll.update.optimizer import describe_update
from eggroll.update.report import make_report, round_coefficients
from eggroll.update.shaping import Shaping
from eggroll.update.told import check_told


@dataclasses.dataclass(frozen=True)
class EvolutionStrategy:
    """Evolution strategy with low-rank perturbations (EGGROLL, arXiv 2511.16652) over any JAX function.

    Args:
        fitness: `fitness(params, batch, key) -> scalar` of one member, higher is better; any JAX code. It may return a vector
            [K] over prompts or tasks, and `(fitness, aux)` when `aux` names a reduction. With a `member_state` given to
            `init` it takes that as a fourth argument and returns its new value last. None when only `ask`/`tell` is used.
        population_size: N, even, >= 2.
        sigma: standard deviation of one entry of the perturbation, > 0, or a schedule `generation -> sigma`; None for `Integer`
            noise. `state._replace(sigma=...)` changes a number between generations; it has no effect on a schedule.
        optimizer: any optax transformation; it gets the descent gradient and `value`, minus the mean fitness. `threshold` for
            `Integer` noise.
        perturbation: `LowRank`, `Dense`, `Integer`, `Frozen`, or rules `[(path pattern, one of them), ...]`, first match wins.
        shaping: a name from `eggroll.SHAPINGS` or a function [N] -> [N].
        noise_reuse: generations that share the same noise, >= 1.
        members_per_batch: None: all members share `batch`; 1: `batch` has a leading axis of N; g: of N / g, consecutive
            groups of g members (even, dividing N) share one entry.
        chunk_size: members evaluated at a time (even), None: all, or what `memory_budget` allows; give one of them.
        memory_budget: bytes of temporary memory of an evaluation, or "device": half of what is free; picks the chunk size.
        aux: how the aux of `fitness` is reduced over the population: "sum", "mean", "max", "min" or "all" (stacked, [N, ...]),
            or a tree prefix of those.
        precision: how parameters narrower than float32, quantised int8 ones among them, are updated: "master", "stochastic",
            "nearest" (see `precision`) or, for int8 ones, a `Feedback`.
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
    precision: str | Feedback = "master"
    mesh: Mesh | None = None
    shard_optimizer: bool = False

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def layout(self) -> PopulationLayout:
        """Layout of the population without a memory budget."""
        return PopulationLayout.of_members(self.population_size, self.members_per_batch, self.chunk_size)

    @property
    def placement(self) -> Placement | None:
        """How a generation is spread over the mesh; None without one."""
        return None if self.mesh is None else Placement(self.mesh, self.layout, self.shard_optimizer)

    def init(self, params: Any, *, key: Array, member_state: Any = None, donate: bool = False) -> ESState:
        """Make the state of a new run.

        Args:
            params: pytree of parameters, and of collections such as `batch_stats`, which are frozen (docs/models.md).
            key: typed key from `jax.random.key`; kept for the whole run, do not use it elsewhere.
            member_state: initial carried state of ONE member, or None.
            donate: take over the arrays of `params`, for models that do not fit twice; the first generation consumes them.

        Returns:
            `ESState` at generation 0.

        Raises:
            TypeError, ValueError: no array leaves, a leaf that is not an array or cannot be perturbed, a wrong key, a
                `precision` that has no effect on these parameters.
        """
        addresses.check_key(key)
        check_params(params, self.perturbation)
        check_precision(self.precision, params, self.perturbation)
        return generation.init_state(self, params, optimizer=self.optimizer, key=key, donate=donate, member_state=member_state)

    def plan(self, state: ESState, batch: Any = None, *, function: Callable | None = None) -> Plan:
        """Return the plan of the parameters, read from one abstract trace of a function; `print(plan.table())` shows it.

        The first function fixes the plan for parameters of these shapes; every later one is compared with it.

        Args:
            state: from `init`.
            batch: as for `step`; arrays or shapes. None: the plan made before, if there is one.
            function: `function(params, batch)` to read instead of the fitness, for `ask`/`tell`.

        Raises:
            ValueError: the function uses a parameter differently from the plan.
        """
        asked = batch is not None or function is not None or not isinstance(state, ESState)
        known = None if asked else programs.find("plan", self, programs.signature(state.params))
        return known or self._checked_plan(state, batch, function)

    def _checked_plan(self, state: ESState, batch: Any, function: Callable | None = None) -> Plan:
        check_state(state)
        read = functools.partial(self._read_plan, state, batch, function)
        return checked_plan(self, function, state.params, (batch, state.member_state), make=read)

    def _read_plan(self, state: ESState, batch: Any, function: Callable | None) -> Plan:
        self.layout.check_batch(batch)
        one = self.layout.one_member(batch)
        given = (one,) if function else member_arguments(one, state.member_state)
        whole = self.placement is None or self.placement.axis("model") is None  # no weight is sharded
        plan = make_plan(function or self._fitness, state.params, *given, perturbation=self.perturbation, allow_kernels=whole)
        estimator.check_sums(plan, num_pairs=self.layout.num_pairs)
        fitness = jax.eval_shape(self._fitness, state.params, *given)[0] if callable(self.shaping) and not function else None
        return describe_update(plan, self.optimizer, state.params, self, on_mesh=self.mesh is not None, fitness=fitness)

    def step(self, state: ESState, batch: Any = None) -> tuple[ESState, Metrics]:
        """Run one generation; return `(state, metrics)`. A later sigma or generation does not compile again.

        Args:
            state: from `init` or the last `step`; consumed (`eggroll.copy_state` keeps a copy).
            batch: any pytree the fitness takes; see `members_per_batch`.
        """
        state = begin(state)
        shapes = programs.signature((state, batch))
        plan, program = programs.remember("step", self, shapes, make=lambda: self._prepare_step(state, batch, shapes))
        state, batch = shard_inputs(self.placement, state, batch, batch_over="examples")
        return self._advance(plan, state, *program(state, batch))

    def _prepare_step(self, state: ESState, batch: Any, shapes: Hashable) -> tuple[Plan, Callable]:
        """Check what only shapes and dtypes decide; return the plan and the program that evaluates and scores."""
        plan, placement = self._checked_plan(state, batch), self.placement
        if placement is not None:
            placement.check(self._fitness, state, batch)
        layout = self.chunked_layout(state, batch)
        evaluate = functools.partial(generation.evaluate_generation, self, plan, self._fitness, layout)
        key, places = ("score", self, programs.Identity(plan), shapes, layout), report_shardings(placement)
        return plan, programs.compile_once(*key, function=evaluate, counted=(self, self.fitness), out_shardings=places)

    def ask(self, state: ESState) -> Population:
        """Return the population of this generation, for fitness that is computed outside JAX."""
        apply, member = functools.partial(self._apply, state), functools.partial(self._member, state)
        return Population(self.population_size, _apply=apply, _member=member)

    def tell(self, state: ESState, fitness: Any, *, pairs: Any = None) -> tuple[ESState, Metrics]:
        """Finish the generation that `ask` began; return `(state, metrics)`.

        Args:
            state: the state given to `ask`; consumed.
            fitness: [N] or [N, K] floats, member 2 p and 2 p + 1 being the signs +1 and -1 of pair p.
            pairs: ints [S], the pairs that the fitness [2 S] or [2 S, K] is of; None: all. The estimate stays unbiased
                when pairs are left out for reasons that have nothing to do with their fitness.

        Raises:
            ValueError: wrong length, unknown or repeated pairs, or no plan yet.
        """
        plan, state = known_plan(self, state.params, needed_by="tell"), begin(state)
        check = functools.partial(check_told, shaping=self.shaping, integers=self.sigma is None)
        state, told = shard_inputs(self.placement, state, check(fitness, pairs, population_size=self.population_size))
        score = functools.partial(generation.score_pairs, self, plan)
        key = ("tell", self, programs.Identity(plan))
        report = programs.compile_once(*key, function=score, out_shardings=replicated(self.placement))(told)
        return self._advance(plan, state, report, state.member_state, generation.current_sigma(self, state))

    def replay(self, state: ESState, coefficients: Any, *, mean_fitness: Any = None, checksums: Any = None) -> ESState:
        """Repeat the update of a generation without evaluating anything.

        Args:
            state: before the generation; consumed. Its sigma is taken to be that of the generation, not asked of a schedule.
            coefficients: float32 [P], its `Metrics.coefficients`.
            mean_fitness: its `Metrics.mean_fitness`, for optimizers that read `value`, such as `reduce_on_plateau`.
            checksums: its `Metrics.checksums[1]`, to compare with; None: nothing is compared.

        Returns:
            The state as `step` left it, bit for bit on the same backend; a carried `member_state` is not rebuilt.

        Raises:
            ValueError: wrong length, or no plan yet. `OtherState`: other values than `step` left; it names the arrays.
        """
        plan = known_plan(self, state.params, needed_by="replay")
        given = check_coefficients(coefficients, population_size=self.population_size)
        return self._update(plan, *shard_inputs(self.placement, state, given), mean_fitness, checksums)[0]

    def checksums(self, state: ESState) -> dict[str, int]:
        """Return the checksum of every array of a state by name, in the order of `Metrics.checksums`; the plan is known."""
        return generation.sum_checksums(self, known_plan(self, state.params, needed_by="checksums"), state)

    def on_one_device(self) -> Self:
        """Return the strategy without its mesh."""
        return dataclasses.replace(self, mesh=None, shard_optimizer=False)

    def parameters(self, state: ESState) -> Any:
        """Return the parameters as the fitness takes them."""
        check_not_consumed(state)
        return state.params

    def evaluate(self, state: ESState, batch: Any, *, function: Callable | None = None) -> Any:
        """Evaluate every member, without shaping or update; for use inside a traced function.

        Args:
            state: from `init` or the last `step`; its plan is known.
            batch: as for `step`.
            function: `function(params, batch, key, member_state)`; None: the fitness, with `(fitness, aux, member_state)`.

        Returns:
            The results with leading axes [P, 2].
        """
        plan = known_plan(self, state.params, needed_by="evaluate")
        return generation.evaluate_members(self, plan, function or self._fitness, self.layout, state, batch)

    def chunked_layout(self, state: ESState, batch: Any, *, function: Callable | None = None) -> PopulationLayout:
        """Return the layout that a batch is evaluated in, in chunks that fit `memory_budget`.

        Args:
            state: from `init`; its plan is known.
            batch: as for `step`.
            function: as for `Population.apply`; None: the fitness.
        """
        if self.memory_budget is None:
            return self.layout
        plan = known_plan(self, state.params, needed_by="memory_budget")
        one_member = generation.ignore_key_and_state(function) if function else self._fitness
        evaluate = functools.partial(generation.evaluate_members, self.on_one_device(), plan, one_member)
        choose = functools.partial(layout_in_budget, evaluate, state, batch, layout=self.layout, placement=self.placement)
        key = "layout", self, function, programs.signature((state, batch))
        return programs.remember(*key, make=functools.partial(choose, budget=self.memory_budget))

    def _advance(
        self, plan: Plan, state: ESState, report: FitnessReport, member_state: Any, sigma: Array
    ) -> tuple[ESState, Metrics]:
        old, state = state.member_state, state._replace(sigma=sigma)
        new_state, done = self._update(plan, state, report.coefficients, report.mean_fitness)
        member_state = jax.tree.map(lambda new, old: jnp.where(done.skipped, old, new), member_state, old)
        return new_state._replace(member_state=member_state), Metrics(state.generation, sigma, *report, *done)

    def _update(self, plan: Plan, state: ESState, given: Array, mean: Any, recorded: Any = None) -> tuple[ESState, Any]:
        rounded = round_coefficients(plan, given, self.shaping)
        state, done = generation.run_update(self, plan, state, rounded, mean, optimizer=self.optimizer, recorded=recorded)
        return state, make_report(plan, done)

    def _apply(self, state: ESState, function: Callable, batch: Any) -> Any:
        plan, state = self._checked_plan(state, batch, function), state._replace(member_state=None)
        layout = self.chunked_layout(state, batch, function=function)
        key = ("apply", self, programs.Identity(plan), function, programs.signature((state, batch)), layout)
        evaluate = functools.partial(generation.apply_to_members, self, plan, function, layout)
        shardings = output_shardings(self.placement)
        program = programs.compile_once(*key, function=evaluate, counted=(self, function), out_shardings=shardings)
        return program(*shard_inputs(self.placement, state, batch, batch_over="members"))

    def _member(self, state: ESState, index: Array | int) -> Any:
        plan, scalars = known_plan(self, state.params, needed_by="member"), generation.make_scalars(self, state)
        return build_member(plan, state.params, index, scalars)

    @property
    def _fitness(self) -> Callable:
        make = functools.partial(normalise_fitness, self.fitness, has_aux=self.aux is not None, integers=self.sigma is None)
        return programs.remember("fitness", self, make=make)  # one object, which JAX traces once for plan and evaluation


_: type[AskTell[ESState]] = EvolutionStrategy  # checked by mypy
