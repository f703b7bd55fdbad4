"""The user's optimizer: what it is given, what is hidden from it, and how far its update splits."""

import contextlib
import dataclasses
import functools
import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from eggroll.digests import digest_of_jaxpr, digest_setting
from eggroll.noise.draws import leaf_keys
from eggroll.noise.leaves import LeafPlan
from eggroll.noise.plan import Plan
from eggroll.noise.regions import Region
from eggroll.noise.rules import Perturbation, is_integer, quantised_leaves, trainable
from eggroll.protocol import Strategy
from eggroll.state import ESState, Masters
from eggroll.update import estimator
from eggroll.update.feedback import Feedback, is_fed_back, remember
from eggroll.update.per_block import per_block
from eggroll.update.precision import float32_params, init_masters
from eggroll.update.splitting import Reading


@functools.partial(jax.tree_util.register_dataclass, data_fields=["key", "generation"], meta_fields=["plan"])
@dataclasses.dataclass(frozen=True)
class NoiseSource:
    """Where an optimizer finds the noise of a generation: with its coefficients, the estimate can be had again at any time."""

    plan: Plan
    key: Array  # typed threefry key of the run
    generation: Array  # int32 [], of the noise

    def map_estimates(self, function: Callable[..., Array], updates: Any, given: Any) -> Any:
        """`function(estimate, given)` for every leaf of the updates, evaluated block by block where the leaf is updated so.

        Args:
            function: gets `estimate(coefficients, noise_generation=, sigma=)`, the ascent estimate of any generation, float32,
                of the leaf or of a block of it; returns values of the same shape, each from the entries at its place.
            updates: of which shapes count.
            given: pytree of arrays that belong to no parameter.
        """
        flat, tree = jax.tree.flatten((jax.random.key_data(self.key), given))

        def of_leaf(leaf: LeafPlan, own: Array) -> Array:
            def of_region(region: Region, *flat: Array) -> Array:
                words, given = jax.tree.unflatten(tree, flat)
                key = jax.random.wrap_key_data(words, impl="threefry2x32")

                def estimate(coefficients: Array, *, noise_generation: Array, sigma: Array) -> Array:
                    keys = leaf_keys([leaf], key, noise_generation)[0]
                    address = {"key": keys, "noise_key": key, "noise_generation": noise_generation}
                    return estimator.region_gradient(leaf, region, coefficients, sigma=sigma, **address)

                return function(estimate, given)

            return per_block(of_region, own, *flat)

        return self.map_leaves(of_leaf, updates)

    def map_leaves(self, function: Callable[[LeafPlan, Array], Array], updates: Any) -> Any:
        """`function(leaf's plan, leaf)` for every leaf of the updates; those that optax has masked stay so."""
        leaves, tree = jax.tree.flatten(updates, is_leaf=is_masked)
        pairs = zip(self.plan.leaves, leaves, strict=True)
        return jax.tree.unflatten(tree, [leaf if is_masked(leaf) else function(own, leaf) for own, leaf in pairs])


def read_update(
    plan: Plan,
    optimizer: optax.GradientTransformationExtraArgs,
    state: ESState,
    coefficients: Any,
    *,
    value: Any,
    sigma: Any,
    noise_generation: Any,
) -> tuple[Reading, Any]:
    """Read how far the update of an optimizer can be split.

    Args:
        plan: the plan that the population was perturbed by.
        optimizer: from `fit_optimizer`; it gets the extra arguments `value`, `coefficients`, `sigma` and `noise`, a
            `NoiseSource`. For int8 parameters one to int8 steps, `threshold`: it gets sums over the pairs, with `deviation`
            and `generation`.
        state: of which shapes and dtypes count here.
        coefficients: [P] of the whole population.
        value: what optax minimises, minus the mean fitness of the population, float32 []; None: not known.
        sigma: standard deviation that the population was perturbed with.
        noise_generation: generation // noise_reuse.

    Returns:
        `(reading, extra)`: with the extra arguments of the update.
    """
    if plan.is_integer:
        extra = {"deviation": estimator.deviations(plan, coefficients), "generation": state.generation}
    else:
        source = NoiseSource(plan, state.key, jnp.asarray(noise_generation, jnp.int32))
        extra = {"coefficients": coefficients, "sigma": sigma, "noise": source}
        extra |= {} if value is None else {"value": value}
    wide = jax.eval_shape(
        lambda params, masters: float32_params(params, masters, quantised=plan.quantised), *state[:1], state.masters
    )
    sums = jnp.int32 if plan.is_integer else jnp.float32
    gradients = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, sums), wide)
    return Reading(optimizer, gradients, state.opt_state, wide, extra), extra


def describe_update(
    plan: Plan, optimizer: Any, params: Any, settings: Strategy[ESState], *, on_mesh: bool, fitness: Any = None
) -> Plan:
    """Return the plan with what is known of the update: how the optimizer lets parameters be updated, and the digests.

    Args:
        plan: of the parameters.
        optimizer: any optax transformation.
        params: of which shapes and dtypes count.
        settings: the strategy.
        on_mesh: whether it runs on a mesh.
        fitness: shape and dtype of the fitness of one member; None: not known, taken to be a float.
    """
    found: list[Reading] = []
    how = settings.perturbation, settings.precision

    def read(params: Any, key: Array, coefficients: Array, value: Array) -> None:
        masters, opt_state = init_masters_and_optimizer(optimizer, params, *how, num_pairs=coefficients.size)
        state = ESState(params, opt_state, key, jnp.int32(0), jnp.float32(1), masters, None)
        given = coefficients.astype(jnp.int32) if plan.is_integer else coefficients
        fitted = fit_optimizer(optimizer, params, *how, num_pairs=coefficients.size)
        scalars = {"value": value, "sigma": state.sigma, "noise_generation": state.generation}
        found.append(read_update(plan, fitted, state, given, **scalars)[0])

    coefficients = jax.ShapeDtypeStruct((settings.population_size // 2,), jnp.float32)
    key, value = jax.eval_shape(lambda: (jax.random.key(0), jnp.float32(0)))
    jax.eval_shape(read, params, key, coefficients, value)
    split = found[0].split
    reason = found[0].reason or (
        "values of one are used for another" if split == "whole" else "an update depends on more than its entry of the gradient"
    )
    fed_back = [index for index, leaf in enumerate(plan.leaves) if is_fed_back(leaf, settings.precision)]
    if fed_back:
        _check_feedback(plan, found[0], fed_back, splits=split == "elements" or (split == "leaves" and not on_mesh))
    if split == "elements":
        line = "block by block"
    elif split == "leaves" and not on_mesh:
        line = f"one parameter at a time: the optimizer does not update each weight on its own ({reason})"
    else:
        line = f"all parameters at once, all gradients in memory: the optimizer does not update each on its own ({reason})"
    one = jnp.float32(0) if fitness is None else fitness
    of_all = jax.ShapeDtypeStruct((settings.population_size, *one.shape), one.dtype)
    functions = digest_setting(settings.sigma, jnp.int32(0)), digest_setting(settings.shaping, of_all)
    return dataclasses.replace(plan, update=line, digests=(plan.digests[0], digest_of_jaxpr(found[0].jaxpr), *functions))


def _check_feedback(plan: Plan, reading: Reading, leaves: list[int], *, splits: bool) -> None:
    """Raise ValueError unless past updates of some int8 parameters can be computed again from their gradients."""
    needs = "precision Feedback needs an optimizer that"
    for index in leaves:
        if not reading.reads_only_gradient(index):
            raise ValueError(
                f"{needs} computes updates of int8 parameters from their gradients alone, such as optax.sgd with a constant "
                f"step size; that of {plan.leaves[index].path!r} also depends on a state (moments, schedule) or on parameters."
            )
    if not splits:
        raise ValueError(
            f"{needs} updates every parameter on its own, on a mesh every weight; this one does not ({reading.reason})."
        )


def fit_optimizer(
    optimizer: Any, params: Any, perturbation: Perturbation, precision: str | Feedback = "master", *, num_pairs: int = 0
) -> optax.GradientTransformationExtraArgs:
    """The user's optimizer as a run calls it: parameters frozen by rule are hidden from it, and its state stays its own.

    Args:
        optimizer: any optax transformation.
        params: pytree of parameters.
        perturbation: of them.
        precision: of the updates; `Feedback` adds the history of the steps to the state.
        num_pairs: P, coefficients of a step in that history.

    Returns:
        The transformation. Its `init` and `update` raise ValueError, naming the part of the optimizer that does not fit.
    """
    mask = trainable(params, perturbation)
    whole = is_integer(perturbation) or all(jax.tree.leaves(mask))  # sums of frozen int8 parameters are zero
    takes = inspect.signature(optimizer.update).parameters.values()
    names, takes_all = {one.name for one in takes}, any(one.kind is one.VAR_KEYWORD for one in takes)

    def hide(tree: Any) -> Any:
        if tree is None or whole:
            return tree
        return jax.tree.map(lambda own, leaf: leaf if own else optax.MaskedNode(), mask, tree)

    def init(params: Any) -> Any:
        with _explain("init", optimizer.init, {}):
            return optimizer.init(hide(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        with _explain("update", optimizer.update, extra):
            given = hide(updates)
            known = {name: value for name, value in extra.items() if takes_all or name in names}
            moves, new_state = optimizer.update(given, state, hide(params), **known)
            for what, before, after in (("an update", given, moves), ("a state", state, new_state)):
                if _shapes(before) != _shapes(after):
                    raise ValueError(f"it returned {what} of another structure or other shapes than it was given")
        if whole:
            return moves, new_state
        return jax.tree.map(lambda own, move, leaf: move if own else jnp.zeros_like(leaf), mask, moves, updates), new_state

    fitted = optax.GradientTransformationExtraArgs(init, update)
    return remember(fitted, precision, num_pairs=num_pairs) if isinstance(precision, Feedback) else fitted


@contextlib.contextmanager
def _explain(call: str, function: Callable, extra: Mapping[str, Any]) -> Iterator[None]:
    """Say of an error in the user's optimizer which part of it does not fit, and what an update is given."""
    try:
        yield
    except Exception as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        theirs = [frame for frame in frames if frame.f_globals["__name__"].split(".")[0] not in ("jax", "eggroll")]
        called = getattr(function, "__qualname__", "")
        parts = [name.partition(".<locals>") for name in (called, *(frame.f_code.co_qualname for frame in theirs))]
        names = [name for name, inner, _ in parts if inner and name != "chain"]
        value = "`value`, minus the mean fitness," if "value" in extra else "no `value` (replay needs mean_fitness for it)"
        raise ValueError(
            f"optimizer{f' {names[-1]}' if names else ''} cannot be used: its {call} raised {type(error).__name__}: "
            f"{str(error).rstrip('.')}. An update is given the gradient, the parameters and {value} but no gradients of "
            "examples and no function to evaluate elsewhere."
        ) from error


def _shapes(tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return structure, [jnp.shape(leaf) for leaf in leaves]


def init_masters_and_optimizer(
    optimizer: Any, params: Any, perturbation: Perturbation, precision: str | Feedback, *, num_pairs: int = 0
) -> tuple[Masters, Any]:
    """Return the masters and the optimizer's state of a new run; arguments as for `fit_optimizer`."""
    grid = quantised_leaves(params, perturbation)
    moving = jax.tree.leaves(trainable(params, perturbation))
    masters = init_masters(params, precision, quantised=grid, moving=moving)
    wide = float32_params(params, masters, quantised=grid)
    return masters, fit_optimizer(optimizer, params, perturbation, precision, num_pairs=num_pairs).init(wide)


def is_masked(leaf: Any) -> bool:
    """Whether optax stands in for a leaf that an optimizer does not see."""
    return isinstance(leaf, optax.MaskedNode)


def places_of_moments(opt_state: Any, params: Any) -> tuple[list[list[int]], list[int]]:
    """Entries of a flat optimizer state that belong to every parameter, and the others.

    Parameters own the entries of a tree like theirs, which has no entry where a parameter is hidden from the optimizer.
    """
    shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
    structure: Any = jax.tree.structure(params)

    def entries(tree: Any) -> list[Any]:
        return jax.tree.leaves(tree, is_leaf=is_masked)

    def is_like(tree: Any) -> bool:
        alike = jax.tree.structure(tree, is_leaf=is_masked) == structure
        return alike and all(is_masked(own) or own.shape == shape for own, shape in zip(entries(tree), shapes, strict=True))

    places: list[list[int]] = [[] for _ in shapes]
    others: list[int] = []
    count = 0
    for part in jax.tree.leaves(opt_state, is_leaf=is_like):
        owners = places if is_like(part) else [others]
        for owner, entry in zip(owners, entries(part), strict=True):
            if not is_masked(entry):
                owner.append(count)
                count += 1
    return places, others
