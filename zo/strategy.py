"""`ZerothOrder`: one step of zeroth-order fine-tuning, from a loss to an update, with forwards only.

    step = losses of perturbed forwards -> estimator -> coefficients -> the engine's update

State, noise addresses, plan, update, meshes, journal and checkpoints are the engine's: a step is a generation whose "pairs" are
directions, and `eggroll.train` and `eggroll.DurableRun` take a `ZerothOrder` like an `EvolutionStrategy`. Parameters are never
restored by adding and subtracting.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from eggroll import generation, plans, programs
from eggroll.devices import sharded
from eggroll.devices.mesh import Placement, shard_inputs
from eggroll.lazy.planning import make_plan
from eggroll.noise import addresses
from eggroll.noise.plan import Plan
from eggroll.noise.rules import Dense, Perturbation, check_params, is_integer, refuse_quantised
from eggroll.population.layout import PopulationLayout, Scalars
from eggroll.population.metrics import FitnessReport, Metrics
from eggroll.protocol import Strategy
from eggroll.settings import check_precision
from eggroll.signatures import check_signature
from eggroll.state import ESState, begin, check_not_consumed
from eggroll.update.optimizer import describe_update
from eggroll.zo.blocks import Blocks, stacked_plan, total_and_weight, whole_loss
from eggroll.zo.estimators import ESTIMATORS, report_losses
from eggroll.zo.optimizers.descent import Descent
from eggroll.zo.room import check_resident


@dataclasses.dataclass(frozen=True)
class ZerothOrder:
    """Zeroth-order optimisation of any JAX loss; `recipes` has the known settings.

    Args:
        loss: `loss(params, batch, key) -> scalar`, lower is better, or `(total, weight)` whose ratio is the loss (a sum over
            target tokens and their number); all forwards of a step get the same key. It need not be differentiable. Or a
            model in pieces, `Blocks`, with the same end.
        directions: n >= 1, perturbations of a step.
        sigma: standard deviation of the perturbation (MeZO's epsilon), > 0.
        optimizer: `Descent`, or any optax transformation.
        estimator: a name out of `ESTIMATORS`. "grzo" gives direction k example k of the batch: the leaves of a batch have a
            leading axis of n, of which the loss sees one entry at a time, [1, ...].
        perturbation: noise of the directions: `Dense`, `LowRank`, `Flipout`, or rules on the paths.
        chunk_directions: directions evaluated at a time; None: all. Each holds its activations and perturbed layers.
        precision: how parameters shorter than float32 are updated (`eggroll.precision`).
        mesh: axes "population" (directions over devices; their two forwards, where there are fewer directions than devices)
            and "data" (the batch over devices), any of them.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
    """

    loss: Callable | Blocks
    _: dataclasses.KW_ONLY
    directions: int
    sigma: float
    optimizer: optax.GradientTransformation | Descent
    estimator: str = "two_point"
    perturbation: Perturbation = Dense()
    chunk_directions: int | None = None
    precision: str = "master"
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        pieces = self.loss if isinstance(self.loss, Blocks) else [self.loss]
        if not all(map(callable, pieces)):
            raise TypeError(f"loss must be a function or Blocks of functions, got {self.loss!r}.")
        if not isinstance(self.optimizer, Descent) and not (
            hasattr(self.optimizer, "init") and hasattr(self.optimizer, "update")
        ):
            raise TypeError(f"optimizer must be a zo.Descent or an optax transformation, got {self.optimizer!r}.")
        for name in ("directions", "chunk_directions"):
            value = getattr(self, name)
            if not (value is None and name != "directions") and not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}.")
        if not (isinstance(self.sigma, int | float) and 0 < self.sigma < float("inf")):
            raise ValueError(f"sigma must be a finite number > 0, got {self.sigma!r}.")
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {self.estimator!r}.")
        if is_integer(self.perturbation):
            raise ValueError("perturbation Integer() is of eggroll.EvolutionStrategy; zeroth-order steps are floating numbers.")
        if ESTIMATORS[self.estimator].normalised and self.directions < 2:
            raise ValueError(f"estimator {self.estimator} divides by the spread of the losses: directions must be >= 2, got 1.")
        if self._sharing > (most := self.layout.num_pairs):
            raise ValueError(
                f"directions {self.directions} can be shared by at most {most} devices; mesh axis "
                f"'population' has {self._sharing}."
            )
        if self.placement is not None and self.placement.axis("data") and self._per_example:
            raise ValueError(
                f"estimator {self.estimator} spreads the examples with the directions: use mesh axis 'population', not 'data'."
            )

    # What the journal and the training loop ask of a strategy.
    noise_reuse = 1
    aux = None

    @property
    def population_size(self) -> int:
        """Members as the journal counts them: two for every direction."""
        return 2 * self.directions

    @property
    def shaping(self) -> str:
        """The estimator, under the name that the journal has for it."""
        return self.estimator

    @property
    def layout(self) -> PopulationLayout:
        """Directions as the engine's pairs."""
        signs, per_pair = ESTIMATORS[self.estimator].signs, 2 if self._per_example else None
        apart = self.directions < self._sharing and not self._per_example
        count = self.directions * len(signs) if apart else self.directions
        # One key for all forwards of a step: the losses that are subtracted see the same dropout.
        return PopulationLayout(count, per_pair, chunk_pairs=self.chunk_directions, signs=signs, same_key=True, apart=apart)

    @property
    def _per_example(self) -> bool:
        return ESTIMATORS[self.estimator].per_example

    @property
    def _sharing(self) -> int:
        """Devices that share the forwards."""
        return self.mesh.shape.get("population", 1) if isinstance(self.mesh, Mesh) else 1

    @property
    def placement(self) -> Placement | None:
        """How a step is spread over the mesh; None without one."""
        return None if self.mesh is None else Placement(self.mesh, self.layout)

    def init(self, params: Any, *, key: Array, batch: Any = None, donate: bool = False) -> ESState:
        """Make the state of a new run.

        Args:
            params: pytree of parameters, and of collections such as `batch_stats`, which are frozen (docs/models.md).
            key: typed key from `jax.random.key`, kept for the whole run.
            batch: as for `step`, arrays or shapes; only `Descent(momentum=...)`, whose state follows the plan, needs it.
            donate: take over the arrays of `params` instead of copying them; the first step consumes them.

        Returns:
            `ESState` at generation (step) 0.

        Raises:
            ValueError: there is momentum, and neither a batch nor a plan; a `precision` without effect on these parameters; the
                devices have no room for the parameters.
        """
        addresses.check_key(key)
        check_params(params, self.perturbation)
        refuse_quantised(params, self.perturbation)
        check_precision(self.precision, params, self.perturbation)
        check_resident(params, self.mesh, precision=self.precision, perturbation=self.perturbation, donate=donate)
        planned = programs.find("plan", self, programs.signature(params)) if batch is None else self.plan_of(params, batch)
        optimizer = self.optax_optimizer(planned)
        return generation.init_state(self, params, optimizer=optimizer, key=key, donate=donate)

    def plan(self, state: ESState, batch: Any = None) -> Plan:
        """Read the plan from one abstract trace of the loss; the first call fixes it. `print(plan.table())` shows it."""
        return self.plan_of(state.params, batch)

    def plan_of(self, params: Any, batch: Any = None) -> Plan:
        """`plan` from parameters, or their shapes and dtypes."""
        known = programs.find("plan", self, programs.signature(params))
        return known if known is not None and batch is None else self._checked_plan(params, batch)

    def _checked_plan(self, params: Any, batch: Any) -> Plan:
        return plans.checked_plan(self, self.loss, params, batch, make=functools.partial(self._read_plan, params, batch))

    def _read_plan(self, params: Any, batch: Any) -> Plan:
        shapes = jax.eval_shape(lambda x: x, batch)
        if self._per_example:
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), shapes)
        key = jax.eval_shape(lambda: jax.random.key(0))
        plan = make_plan(self._weighted, params, shapes, key, perturbation=self.perturbation)
        plan = stacked_plan(plan) if isinstance(self.loss, Blocks) else plan
        return describe_update(plan, self.optax_optimizer(plan), params, self, on_mesh=self.mesh is not None)

    def step(self, state: ESState, batch: Any = None) -> tuple[ESState, Metrics]:
        """Run one step.

        Args:
            state: from `init` or the last `step`; consumed (`eggroll.copy_state` keeps a copy).
            batch: any pytree the loss takes; with a per-example estimator, with a leading axis of n.

        Returns:
            `(state, metrics)`; `metrics.mean_fitness` is minus the loss: of the unperturbed parameters where the estimator
            evaluates them (`ESTIMATORS[...].unperturbed`), else the mean over the perturbed ones. `metrics.coefficients` are
            -d, so that -coefficients / (2 sigma) are the projected gradients of the two-point estimator.
        """
        state = begin(state)
        self.check_batch(batch)
        plan = self._checked_plan(state.params, batch)
        placement, shapes = self.placement, programs.signature((state, batch))
        if placement is not None:
            programs.remember("checked", self, shapes, make=lambda: placement.check(self._weighted, state, batch))
        state, batch = shard_inputs(placement, state, batch, batch_over="examples")
        key, evaluate = ("score", self, programs.Identity(plan), shapes), functools.partial(self.score, plan)
        score = programs.compile_once(*key, function=evaluate, counted=(self, self.loss))
        report = score(state, batch)
        new_state, done = self._update(plan, state, report.coefficients, report.mean_fitness)
        return new_state, Metrics(state.generation, state.sigma, *report, *done)

    def replay(self, state: ESState, coefficients: Any, *, mean_fitness: Any = None, checksums: Any = None) -> ESState:
        """Repeat the update of a step without evaluating anything.

        Args:
            state: before the step, consumed; the plan is known.
            coefficients: float32 [n], `Metrics.coefficients` of the step.
            mean_fitness: its `Metrics.mean_fitness`, for optimizers that read `value`.
            checksums: its `Metrics.checksums[1]`, to compare with; None: nothing is compared.

        Raises:
            ValueError: wrong length, or no plan yet. `OtherState`: other values than `step` left.
        """
        given = jnp.asarray(coefficients, jnp.float32)
        if given.shape != (self.directions,):
            raise ValueError(f"coefficients must have shape ({self.directions},), got {given.shape}.")
        plan = plans.known_plan(self, state.params, needed_by="replay")
        return self._update(plan, *shard_inputs(self.placement, state, given), mean_fitness, checksums)[0]

    def checksums(self, state: ESState) -> dict[str, int]:
        """As `EvolutionStrategy.checksums`."""
        return generation.sum_checksums(self, plans.known_plan(self, state.params, needed_by="checksums"), state)

    def parameters(self, state: ESState) -> Any:
        """Return the parameters as the loss takes them."""
        check_not_consumed(state)
        return state.params

    def check_batch(self, batch: Any) -> None:
        """Raise ValueError unless a batch has an example for every direction, where the estimator gives them one each."""
        if not self._per_example:
            return
        shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(batch)]
        wrong = [shape for shape in shapes if shape[:1] != (self.directions,)] if shapes else ["no arrays"]
        if wrong:
            raise ValueError(
                f"estimator {self.estimator} gives every direction an example: batch leaves need a leading axis of directions, "
                f"{self.directions}, got {wrong[0]}."
            )

    def _of_direction(self, params: Any, batch: Any, key: Array, _: Any = None) -> tuple[Array, Array]:
        """`_weighted` of a direction's share of the batch."""
        return self._weighted(params, jax.tree.map(lambda x: x[None], batch) if self._per_example else batch, key)

    def _weighted(self, params: Any, batch: Any, key: Array, _: Any = None) -> tuple[Array, Array]:
        """The loss as (total, weight), float32."""
        loss = whole_loss(self.loss) if isinstance(self.loss, Blocks) else self.loss
        check_signature("loss", loss, ("params", "batch", "key"))
        return total_and_weight(loss(params, batch, key))

    def score(self, plan: Plan, state: ESState, batch: Any) -> FitnessReport:
        """Evaluate the losses of a step, and report them with the coefficients; `step` compiles this."""
        estimator, placement = ESTIMATORS[self.estimator], self.placement
        evaluation_key = jax.random.fold_in(addresses.stream_key(state.key, 1), state.generation)
        shared = dict[str, Any](placement=placement, over_data=("sum", "sum"))
        totals, weights = sharded.evaluate(
            self._of_direction,
            plan,
            state.params,
            Scalars(state.key, state.generation, state.sigma, evaluation_key),
            layout=self.layout,
            batch=batch,
            **shared,
        )
        losses = totals / weights
        if placement is not None:
            losses = jax.lax.with_sharding_constraint(losses, placement.replicated)
        base = jnp.float32(jnp.nan)
        if estimator.unperturbed:
            total, weight = sharded.evaluate_unperturbed(self._weighted, state.params, batch, evaluation_key, **shared)
            base = total / weight
        losses = losses.reshape(self.directions, len(estimator.signs))
        return report_losses(estimator, losses, base, sigma=state.sigma, rank=plan.max_rank)

    def _update(self, plan: Plan, state: ESState, given: Array, mean: Any, recorded: Any = None) -> tuple[ESState, Any]:
        optimizer = self.optax_optimizer(plan)
        return generation.run_update(self, plan, state, given, mean, optimizer=optimizer, recorded=recorded)

    def optax_optimizer(self, plan: Plan | None) -> optax.GradientTransformation:
        """Return the optimizer as an optax transformation; momentum needs the plan."""
        own = self.optimizer
        if isinstance(own, Descent):
            own = own.transformation(directions=self.directions, plan=plan)
        return own


_: type[Strategy[ESState]] = ZerothOrder  # checked by mypy
