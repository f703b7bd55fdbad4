"""Compares a population with members built explicitly, and reads from the plan what every parameter got.

    error      max |apply(f, batch)_i - f(member_i, batch)| / max |f(member_i, batch) - f(params, batch)|

An unperturbed result has error 1. What rounding explains is measured, not guessed: the largest change of f(member_i) where
every weight and input moves by half a unit in the last place of the program's narrowest float, times `MARGIN`. Integers and
booleans may differ only where that changes them, too: at ties.
"""

import contextlib
import dataclasses
import io
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend.core as jexc
import jax.numpy as jnp
import numpy as np
import optax

import eggroll
from eggroll.experiments.uses.use import Program
from eggroll.noise.leaves import LeafPlan
from eggroll.noise.plan import Plan
from eggroll.noise.rules import Perturbation, paths

SIGMA = 0.2
MARGIN = 8.0  # errors of intermediate results and of another order of sums, over those of rounding the operands
JITTERS = 3  # random directions of a member
WEAK = 0.5  # a tolerance above it would hardly tell an unperturbed result, whose error is 1
LONGEST = 500  # characters of a clear error
ROLES = ("wrong", "refused", "dense", "built", "flipout", "low-rank")  # the worst first


@dataclasses.dataclass(frozen=True)
class Finding:
    """What became of one use."""

    role: str  # the worst of a large parameter, one of `ROLES`
    error: float | None  # None: nothing was evaluated
    tolerance: float | None
    note: str  # reason of dense noise, or what is wrong
    leaves: dict[str, tuple[str, str]]  # path -> role and reason


def strategy(members: int, perturbation: Perturbation, *, fitness: Any = None, **options: Any) -> eggroll.EvolutionStrategy:
    """The strategy of all checks."""
    return eggroll.EvolutionStrategy(
        fitness, population_size=members, sigma=SIGMA, optimizer=optax.sgd(1.0), perturbation=perturbation, **options
    )


def check(program: Program, *, members: int, perturbation: Perturbation) -> Finding:
    """Evaluate a population and its built members.

    Args:
        program: what every member evaluates.
        members: N, even.
        perturbation: noise of the parameters.

    Returns:
        The finding. An error that names a parameter is `refused`, any other is `wrong`.
    """
    with jax.default_matmul_precision("highest"), quick_compilation(), quiet():
        plain = jax.jit(program.function)
        unperturbed = _fetch(plain(program.params, program.batch))  # a fault of the table itself is raised here
        es = strategy(members, perturbation)
        try:
            state = es.init(program.params, key=jax.random.key(5))
            plan = es.plan(state, program.batch, function=program.function)
            population = es.ask(state)
            outputs = _fetch(population.apply(program.function, program.batch))
        except Exception as raised:
            return _raised(raised, program.params)
        built = jax.device_get(jax.jit(jax.vmap(population.member))(jnp.arange(members)))
        jaxpr = jax.make_jaxpr(program.function)(program.params, program.batch).jaxpr
        error, tolerance = _compare(plain, program, built, outputs, unperturbed, _spacing(jaxpr))
        problem = _problem(plan, program, plain, unperturbed, jaxpr, error, tolerance)
    leaves = {leaf.path: (leaf.role, leaf.reason) for leaf in plan.leaves}
    return Finding("wrong" if problem else _role(plan), error, tolerance, problem or _reasons(plan), leaves)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Swallow what programs print; third-party models rely on the promotion of dtypes."""
    with contextlib.redirect_stdout(io.StringIO()), jax.numpy_dtype_promotion("standard"):
        yield
        jax.effects_barrier()


@contextlib.contextmanager
def quick_compilation() -> Iterator[None]:
    """Compile without most optimisations: two fifths less time."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def _fetch(outputs: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.device_get(jax.tree.leaves(outputs))]


def _raised(error: Exception, params: Any) -> Finding:
    kind, message = type(error).__name__, " ".join(str(error).split())
    named = any(re.search(f"(parameters?|leaf) '{re.escape(path)}'", message, re.IGNORECASE) for path in paths(params))
    clear = isinstance(error, ValueError | TypeError) and named and len(message) <= LONGEST
    return Finding("refused" if clear else "wrong", None, None, message if clear else f"{kind}: {message[:300]}", {})


def _compare(
    plain: Callable, program: Program, built: Any, outputs: list[np.ndarray], unperturbed: list[np.ndarray], eps: float
) -> tuple[float, float]:
    """Return the largest error of an output and its tolerance, both relative to the effect of the perturbation."""
    expected, moved = [], []
    random = np.random.default_rng(0)
    for index in range(len(jax.tree.leaves(built)[0])):
        member = jax.tree.map(lambda leaf, index=index: leaf[index], built)
        expected.append(_fetch(plain(member, program.batch)))
        moved.append([_fetch(plain(*_jitter((member, program.batch), eps, random))) for _ in range(JITTERS)])
    worst, reached = (0.0, 0.0), False
    for place, output in enumerate(outputs):
        truth = np.stack([own[place] for own in expected])
        nearby = np.stack([[draw[place] for draw in draws] for draws in moved], axis=1)  # [JITTERS, N, ...]
        start = unperturbed[place][None]
        reached |= not np.array_equal(truth, np.broadcast_to(start, truth.shape))
        pair = compare_output(output, truth, nearby, start, eps)
        worst = max(worst, pair, key=lambda pair: (pair[0] / max(pair[1], 1e-30), pair[1]))
    return worst if reached else (worst[0], np.inf)


def compare_output(
    output: np.ndarray, truth: np.ndarray, nearby: np.ndarray, start: np.ndarray, eps: float
) -> tuple[float, float]:
    """Error and tolerance of one output [N, ...]."""
    if output.shape != truth.shape or output.dtype != truth.dtype:
        return np.inf, 0.0
    if np.issubdtype(truth.dtype, np.integer) or truth.dtype == bool:
        ties = (nearby != truth).any(axis=0)
        effect = np.max(np.abs(truth.astype(np.int64) - start), initial=0)
        wrong = np.where(ties, 0, np.abs(output.astype(np.int64) - truth))
        return float(np.max(wrong, initial=0) / max(effect, 1)), 0.0
    effect = _distance(truth, np.broadcast_to(start, truth.shape))
    size = float(np.max(np.abs(_wide(truth)), initial=0.0, where=np.isfinite(_wide(truth))))
    rounding = MARGIN * max(_distance(own, truth) for own in nearby) + 8 * eps * size
    error = _distance(output, truth)
    if effect == 0.0 or not np.isfinite(effect):
        return (0.0 if error <= rounding else np.inf), 0.0
    return error / effect, rounding / effect


def _wide(values: np.ndarray) -> np.ndarray:
    return values.astype(np.complex128 if np.issubdtype(values.dtype, np.complexfloating) else np.float64)


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference; NaN and infinities are equal to themselves."""
    a, b = _wide(a), _wide(b)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        apart = np.where(same, 0.0, np.abs(a - b))
    return float(np.max(np.where(np.isnan(apart), np.inf, apart), initial=0.0))


def _jitter(tree: Any, eps: float, random: np.random.Generator) -> Any:
    """The same tree, every float moved by `eps` of itself."""

    def move(leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf
        values = np.asarray(leaf)
        return (_wide(values) * (1 + eps * random.choice((-1.0, 1.0), values.shape))).astype(values.dtype)

    return jax.tree.map(move, tree)


def _problem(
    plan: Plan,
    program: Program,
    plain: Callable,
    unperturbed: list[np.ndarray],
    jaxpr: Any,
    error: float,
    tolerance: float,
) -> str:
    """What is wrong, "" if nothing is."""
    if error > tolerance:
        return f"members differ from built ones: error {error:.2g}, rounding explains {tolerance:.1g}"
    if tolerance > WEAK:
        reason = f"rounding alone explains an error of {tolerance:.2g}" if np.isfinite(tolerance) else "no output is perturbed"
        return f"the check has no power: {reason}"
    for place, leaf in enumerate(plan.leaves):
        if leaf.role == "frozen" and _matters(place, program, plain, unperturbed):
            return f"'{leaf.path}' is silently unperturbed: {leaf.reason}"
    primitives = {equation.primitive.name for equation in _equations(jaxpr)}
    for leaf in plan.leaves:
        named = re.findall(r"used (?:by|in) '(\w+)'", leaf.reason)
        if not primitives.issuperset(named):
            return f"the reason of '{leaf.path}' names what the program does not have: {leaf.reason}"
    return ""


def _matters(place: int, program: Program, plain: Callable, unperturbed: list[np.ndarray]) -> bool:
    """Whether the outputs depend on a parameter."""
    leaves, tree = jax.tree.flatten(program.params)
    leaves[place] = leaves[place] + jnp.cos(jnp.arange(leaves[place].size)).reshape(leaves[place].shape).astype(
        leaves[place].dtype
    )
    changed = _fetch(plain(jax.tree.unflatten(tree, leaves), program.batch))
    return any(not np.array_equal(a, b, equal_nan=a.dtype.kind in "fc") for a, b in zip(changed, unperturbed, strict=True))


def _equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a program, those inside others included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple) else (value,):
                if isinstance(inner, jexc.ClosedJaxpr | jexc.Jaxpr):
                    yield from _equations(inner.jaxpr if isinstance(inner, jexc.ClosedJaxpr) else inner)


def _spacing(jaxpr: Any) -> float:
    """Half a unit in the last place of the narrowest float of a program, relative."""
    atoms = [*jaxpr.invars, *(variable for equation in _equations(jaxpr) for variable in equation.outvars)]
    dtypes = {atom.aval.dtype for atom in atoms if hasattr(atom.aval, "dtype")}
    return max([float(jnp.finfo(dtype).eps) / 2 for dtype in dtypes if jnp.issubdtype(dtype, jnp.inexact)], default=0.0)


def _large(plan: Plan) -> list[LeafPlan]:
    """What is perturbed, without parameters below a quarter of the largest, such as biases."""
    moving = [leaf for leaf in plan.leaves if leaf.role != "frozen"]
    largest = max(math.prod(leaf.shape) for leaf in moving)
    return [leaf for leaf in moving if 4 * math.prod(leaf.shape) >= largest]


def _role(plan: Plan) -> str:
    """The worst role of a large parameter."""
    return min((leaf.role for leaf in _large(plan)), key=ROLES.index)


def _reasons(plan: Plan) -> str:
    return "; ".join(f"'{leaf.path}' {leaf.reason}" for leaf in _large(plan) if leaf.role in ("dense", "built"))
