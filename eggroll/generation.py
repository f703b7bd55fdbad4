"""The traced parts of a generation, which a strategy compiles, and the compiled update, which strategies share.

evaluate_members    the population's results            population -> fitness
score_generation    fitness -> report with the coefficients of the pairs
update_parameters   coefficients -> gradient estimate -> optimizer -> new state
init_state          parameters -> state
run_update          the compiled update, in the memory of the state that it is given
sum_checksums       the checksums of a state, as the update reports them before and after
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from eggroll import programs
from eggroll.devices import sharded
from eggroll.devices.mesh import Placement, replicated, shard_inputs, update_shardings
from eggroll.noise import addresses
from eggroll.noise.once import rounded_once
from eggroll.noise.plan import Plan
from eggroll.noise.regions import LIMIT
from eggroll.population.layout import PopulationLayout, Scalars
from eggroll.population.metrics import FitnessReport, keep_valid, reduce_aux, report_fitness, valid_members
from eggroll.protocol import Strategy
from eggroll.state import ESState, check_not_consumed, copy_state, unshare
from eggroll.update import estimator
from eggroll.update.checksums import checksum_names, compare, sum_state
from eggroll.update.optimizer import fit_optimizer, init_masters_and_optimizer
from eggroll.update.told import Told

LAST_GENERATION = 2**31 - 1  # its update is skipped, and the counter stays


class Settings(Strategy[ESState], Protocol):
    """The settings of a strategy that the programs of a generation read, in addition to those of every strategy."""

    @property
    def aux(self) -> Any:
        """Reductions of the aux, names out of `metrics.REDUCTIONS`; None: there is no aux."""

    @property
    def placement(self) -> Placement | None:
        """How a generation is spread over the mesh; None: one device."""


def current_sigma(settings: Settings, state: ESState) -> Array:
    """Return the standard deviation of a generation, float32 []."""
    return jnp.asarray(settings.sigma(state.generation), jnp.float32) if callable(settings.sigma) else state.sigma


def make_scalars(settings: Settings, state: ESState) -> Scalars:
    """Return what identifies the perturbations and the randomness of a generation."""
    evaluation_key = jax.random.fold_in(addresses.stream_key(state.key, 1), state.generation)
    return Scalars(state.key, state.generation // settings.noise_reuse, current_sigma(settings, state), evaluation_key)


def evaluate_members(
    settings: Settings, plan: Plan, function: Callable, layout: PopulationLayout, state: ESState, batch: Any
) -> Any:
    """Run `function(params, batch, key, member_state)` for every member; results have leading axes [P, 2]."""
    return sharded.evaluate(
        function,
        plan,
        state.params,
        make_scalars(settings, state),
        placement=settings.placement,
        layout=layout,
        batch=batch,
        member_state=state.member_state,
    )


def apply_to_members(
    settings: Settings, plan: Plan, function: Callable, layout: PopulationLayout, state: ESState, batch: Any
) -> Any:
    """Apply `function(params, batch)` to every member; results have a leading axis of N."""
    results = evaluate_members(settings, plan, ignore_key_and_state(function), layout, state, batch)
    return jax.tree.map(lambda x: x.reshape(2 * x.shape[0], *x.shape[2:]), results)


def ignore_key_and_state(function: Callable) -> Callable:
    """Give `function(params, batch)` the signature of a member's evaluation."""

    def one_member(params: Any, batch: Any, key: Array, member_state: Any) -> Any:
        return function(params, batch)

    return one_member


def evaluate_generation(
    settings: Settings, plan: Plan, fitness: Callable, layout: PopulationLayout, state: ESState, batch: Any
) -> tuple[FitnessReport, Any, Array]:
    """Evaluate the population with a function from `fitness.normalise_fitness`; score it; return the sigma, too."""
    values, aux, member_state = sharded.evaluate_fitness(
        fitness,
        plan,
        state.params,
        make_scalars(settings, state),
        placement=settings.placement,
        layout=layout,
        aux=settings.aux,
        batch=batch,
        member_state=state.member_state,
    )
    # What is reported, and what the update reads: the same bits here and in a program of several generations (`scan`).
    values = rounded_once(values.reshape(settings.population_size, *values.shape[2:]))
    valid = valid_members(values)
    aux = jax.tree.map(rounded_once, reduce_aux(settings.aux, aux, valid))
    report = score_generation(settings, plan, values, aux=aux)
    read = report.coefficients, report.mean_fitness, current_sigma(settings, state)
    coefficients, mean, sigma = map(rounded_once, read)
    report = report._replace(coefficients=coefficients, mean_fitness=mean)
    return report, keep_valid(valid, member_state, state.member_state), sigma


def score_generation(settings: Settings, plan: Plan, fitness: Array, *, aux: Any, scores: Array | None = None) -> FitnessReport:
    """Shape the fitness, fold the pairs and report.

    Args:
        settings: the strategy.
        plan: the plan that the population was perturbed by.
        fitness: [N] or [N, K].
        aux: reduced over the population.
        scores: what the shaping sees in place of the fitness (`told.Told`); None: the fitness.
    """
    scores = fitness if scores is None else scores
    coefficients = estimator.compute_coefficients(plan, settings.shaping, scores)
    return report_fitness(fitness, coefficients, rank=plan.max_rank, aux=aux, scores=scores)


def score_pairs(settings: Settings, plan: Plan, told: Told) -> FitnessReport:
    """`score_generation` of some pairs; the report has the coefficients of all.

    Args:
        settings: the strategy.
        plan: the plan that the population was perturbed by.
        told: fitness of the pairs.
    """
    report = score_generation(settings, plan, told.fitness, aux=None, scores=told.scores)
    spread = estimator.spread_to_all_pairs(plan, report.coefficients, told.pairs, num_pairs=settings.population_size // 2)
    return report._replace(coefficients=spread)


def update_parameters(
    settings: Settings,
    plan: Plan,
    state: ESState,
    coefficients: Array,
    *,
    value: Array | None = None,
    optimizer: optax.GradientTransformation,
    shardings: ESState | None = None,
) -> tuple[ESState, Any]:
    """Estimate the gradient and update the parameters.

    Args:
        settings: the strategy.
        plan: the plan that the population was perturbed by.
        state: before the update; its sigma is the one that the population was perturbed with, whatever a schedule says.
        coefficients: [P], from the report; whole numbers for int8 parameters.
        value: minus the mean fitness of the population, float32 [], for optimizers that read it; None: not known.
        optimizer: any optax transformation; parameters frozen by rule are hidden from it.
        shardings: of the state on a mesh (`Placement.shardings`); None: unknown, or no mesh.

    Returns:
        The state of the next generation, and the raw values that `report.make_report` takes.
    """
    new_state, done = sharded.update(
        plan,
        fit_optimizer(
            optimizer, state.params, settings.perturbation, settings.precision, num_pairs=settings.population_size // 2
        ),
        state,
        coefficients,
        placement=settings.placement,
        shardings=shardings,
        value=value,
        sigma=state.sigma,
        noise_generation=state.generation // settings.noise_reuse,
        precision=settings.precision,
    )
    new_state = new_state._replace(generation=jnp.minimum(state.generation, LAST_GENERATION - 1) + 1)
    if callable(settings.sigma):
        following = current_sigma(settings, new_state)
        new_state = new_state._replace(sigma=jnp.where(jnp.isfinite(following), following, state.sigma))
    return new_state, done


def init_state(
    settings: Settings,
    params: Any,
    *,
    optimizer: optax.GradientTransformation,
    key: Array,
    donate: bool,
    member_state: Any = None,
) -> ESState:
    """Make the state of a new run, whose arrays share no memory with each other or with the caller.

    Args:
        settings: the strategy.
        params: pytree of parameters.
        optimizer: any optax transformation.
        key: typed key of the run.
        donate: take over the arrays of `params`.
        member_state: of one member, or None.
    """
    check_not_consumed(params)
    params = jax.tree.map(jnp.asarray, params) if donate else copy_state(params)
    make = functools.partial(
        init_masters_and_optimizer,
        optimizer,
        perturbation=settings.perturbation,
        precision=settings.precision,
        num_pairs=settings.population_size // 2,
    )
    if settings.placement is None and sum(leaf.size for leaf in jax.tree.leaves(params)) > LIMIT:
        masters, opt_state = jax.jit(make)(params)  # without float32 copies of short parameters on the way
    else:
        masters, opt_state = make(params)
        opt_state = copy_state(opt_state)  # the optimizer may have returned arrays of its own
    sigma = settings.sigma(jnp.int32(0)) if callable(settings.sigma) else 1.0 if settings.sigma is None else settings.sigma
    pairs = (settings.population_size // 2, 2)
    per_member = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*pairs, *jnp.shape(leaf))), member_state)
    state = ESState(params, opt_state, key, jnp.int32(0), jnp.float32(sigma), masters, per_member)
    return unshare(shard_inputs(settings.placement, state, None)[0])


def run_update(
    settings: Settings,
    plan: Plan,
    state: ESState,
    coefficients: Array,
    mean_fitness: Any,
    *,
    optimizer: optax.GradientTransformation,
    recorded: Any = None,
) -> tuple[ESState, Any]:
    """Run the compiled update: a program of its own, so that `step`, `tell` and `replay` give the same bits.

    Args:
        settings: the strategy.
        plan: the plan that the population was perturbed by.
        state: before the update; its parameters, masters and optimizer state are consumed.
        coefficients: as for `update_parameters`.
        mean_fitness: of the population, a number or float32 []; None: not known.
        optimizer: any optax transformation.
        recorded: checksums that the state must have afterwards, uint32 [arrays]; None: not known.

    Raises:
        OtherState: it has others.
    """
    shardings = update_shardings(settings.placement, state)
    places = shardings and shardings[0]
    key = ("update", settings, programs.Identity(plan), programs.signature(state), tuple(jax.tree.leaves(shardings)))

    def update(own: tuple[Any, Any, Any], rest: ESState, coefficients: Array, mean: Array | None) -> tuple[ESState, Any]:
        params, opt_state, masters = own
        whole = rest._replace(params=params, opt_state=opt_state, masters=masters)
        value = None if mean is None else -mean
        return update_parameters(settings, plan, whole, coefficients, value=value, optimizer=optimizer, shardings=places)

    program = programs.compile_once(*key, function=update, out_shardings=shardings, donate_argnums=0)
    rest, mean = state._replace(params=None, opt_state=None, masters=()), mean_fitness
    mean = None if mean is None else jnp.asarray(mean, jnp.float32)
    new_state, done = program((state.params, state.opt_state, state.masters), rest, coefficients, mean)
    if recorded is not None:
        compare(checksum_names(new_state), recorded, done.checksums[1])
    return new_state, done


def sum_checksums(settings: Settings, plan: Plan, state: ESState) -> dict[str, int]:
    """Return the checksum of every array of a state by name, in the order of `UpdateReport.checksums`."""
    state = shard_inputs(settings.placement, state._replace(member_state=None), None)[0]
    key = ("checksums", settings, programs.Identity(plan), programs.signature(state))
    places = replicated(settings.placement)
    program = programs.compile_once(*key, function=functools.partial(sum_state, plan), out_shardings=places)
    return dict(zip(checksum_names(state), np.asarray(program(state)).tolist(), strict=True))
