"""What the training loop, durable runs, the journal and remote evaluation need of a strategy and of its state.

    step:    (state, batch) -> (next state, metrics)
    replay:  (state, metrics.coefficients, metrics.mean_fitness) -> the same next state, bit for bit, without any evaluation

`EvolutionStrategy`, `zo.ZerothOrder`, `zo.Offload` and `External` are strategies; mypy checks each of them in its own module.
"""

from collections.abc import Callable
from typing import Any, Protocol, Self, TypeVar

from jax import Array

from eggroll.noise.plan import Plan
from eggroll.population.members import Population
from eggroll.population.metrics import Metrics


class State(Protocol):
    """State of a run: a NamedTuple and a pytree of arrays, with a type-preserving `_replace`."""

    @property
    def params(self) -> Any:
        """Everything that `replay` rebuilds the parameters in; the journal and checkpoints keep its fingerprint."""

    @property
    def key(self) -> Array:
        """Typed key of the run; never changes."""

    @property
    def generation(self) -> Array:
        """Generations done, int32 []."""

    @property
    def sigma(self) -> Array:
        """Standard deviation of the next generation, float32 []."""

    @property
    def member_state(self) -> Any:
        """Carried per member, [P, 2, ...], or None; the only field that `replay` does not rebuild."""

    def _asdict(self) -> dict[str, Any]:
        """The fields by name."""

    @property
    def _replace(self) -> Callable[..., Self]:
        """Copy with some fields replaced."""


S = TypeVar("S", bound=State)


class Strategy(Protocol[S]):
    """What `train`, `DurableRun` and the journal need; the properties identify a run in the header of its journal."""

    @property
    def population_size(self) -> int:
        """Members evaluated in one generation: twice the number of coefficients."""

    @property
    def noise_reuse(self) -> int:
        """Generations that share the same noise."""

    @property
    def precision(self) -> Any:
        """How parameters narrower than float32 are updated: a name, or a `Feedback`."""

    @property
    def sigma(self) -> Any:
        """Standard deviation of the perturbation, a schedule of it, or None."""

    @property
    def shaping(self) -> Any:
        """How fitness becomes coefficients: a name or a function."""

    @property
    def perturbation(self) -> Any:
        """Noise of the parameters."""

    def plan(self, state: S, batch: Any = None) -> Plan:
        """Return the plan; without a batch the one made before."""

    def step(self, state: S, batch: Any) -> tuple[S, Metrics]:
        """Run one generation."""

    def replay(self, state: S, coefficients: Any, *, mean_fitness: Any = None, checksums: Any = None) -> S:
        """Repeat the update of a generation; may consume `state`. With checksums, compare: `OtherState` is raised."""

    def checksums(self, state: S) -> dict[str, int]:
        """Return the checksums of a state by name, in the order of `Metrics.checksums`."""

    def parameters(self, state: S) -> Any:
        """Return the parameters as the user's functions take them."""


class AskTell(Strategy[S], Protocol[S]):
    """What `External` and `RemoteEvaluator` need in addition: the two halves of a generation."""

    @property
    def fitness(self) -> Callable | None:
        """Fitness of one member; None where only `ask` and `tell` are used."""

    def init(self, params: Any, *, key: Array, donate: bool = False) -> S:
        """Make the state of a new run; `donate` takes the arrays over."""

    def plan(self, state: S, batch: Any = None, *, function: Callable | None = None) -> Plan:
        """Return the plan of `function(params, batch)`; None: of the fitness."""

    def on_one_device(self) -> Self:
        """Return the strategy without its mesh."""

    def ask(self, state: S) -> Population:
        """Return the population of this generation."""

    def tell(self, state: S, fitness: Any, *, pairs: Any = None) -> tuple[S, Metrics]:
        """Finish the generation that `ask` began, with the fitness [2 S] of the pairs [S]; None: of all."""
