"""`External`: a strategy whose fitness is computed outside JAX, in the form that `train` and `DurableRun` take.

    ask -> function(params, inputs) of every member -> score(outputs, known) on the host -> tell

Outputs can be scored by anything: a Python function on texts, a simulator, a server (docs/external.md). Such a run has the
progress line, journal, checkpoints and exact resume of any other.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array

from eggroll.devices.processes import broadcast_from_first, gather
from eggroll.noise.plan import Plan
from eggroll.population.metrics import Metrics
from eggroll.protocol import AskTell, Strategy
from eggroll.state import ESState
from eggroll.update.feedback import Feedback


@dataclasses.dataclass(frozen=True)
class External:
    """A strategy with the score of its members computed by Python.

    Args:
        es: made with `fitness=None`.
        function: `function(params, inputs) -> outputs` of one member, any JAX code; inputs as the strategy's
            `members_per_batch` says.
        score: `score(outputs, known) -> fitness`, or `(fitness, aux)`: outputs are NumPy arrays with a leading axis of N,
            fitness is [N] or [N, K], higher is better, aux is anything and is passed through. With several processes the first
            one scores, and the others receive its fitness; their aux is None.

    Raises:
        ValueError: the strategy has a fitness of its own.
    """

    es: AskTell[ESState]
    function: Callable
    score: Callable

    def __post_init__(self) -> None:
        if self.es.fitness is not None:
            raise ValueError("es must have fitness=None: External computes it with function and score.")

    def init(self, params: Any, *, key: Array, donate: bool = False) -> ESState:
        """As `EvolutionStrategy.init`."""
        return self.es.init(params, key=key, donate=donate)

    def plan(self, state: ESState, batch: Any = None) -> Plan:
        """As `EvolutionStrategy.plan`, of `function`; `batch` is `(inputs, known)`."""
        return self.es.plan(state, batch[0], function=self.function) if batch else self.es.plan(state)

    def step(self, state: ESState, batch: Any) -> tuple[ESState, Metrics]:
        """Run one generation.

        Args:
            state: from `init` or the last `step`; consumed.
            batch: `(inputs, known)`: what `function` gets, and what `score` gets besides the outputs.

        Returns:
            `(state, metrics)`; `metrics.aux` is what `score` returned with the fitness.

        Raises:
            ValueError: the fitness has another length than the population.
        """
        inputs, known = batch
        outputs = jax.tree.map(gather, self.es.ask(state).apply(self.function, inputs))
        aux = None

        def fitness() -> np.ndarray:
            nonlocal aux
            result = self.score(outputs, known)
            value, aux = result if isinstance(result, tuple) else (result, None)
            return np.asarray(value)

        state, metrics = self.es.tell(state, broadcast_from_first(fitness))
        return state, metrics._replace(aux=aux)

    def replay(self, state: ESState, coefficients: Any, *, mean_fitness: Any = None, checksums: Any = None) -> ESState:
        """As `EvolutionStrategy.replay`."""
        return self.es.replay(state, coefficients, mean_fitness=mean_fitness, checksums=checksums)

    def checksums(self, state: ESState) -> dict[str, int]:
        """As `EvolutionStrategy.checksums`."""
        return self.es.checksums(state)

    def parameters(self, state: ESState) -> Any:
        """As `EvolutionStrategy.parameters`."""
        return self.es.parameters(state)

    @property
    def population_size(self) -> int:
        """Of the strategy, as all that follow."""
        return self.es.population_size

    @property
    def noise_reuse(self) -> int:
        """Generations that share the same noise."""
        return self.es.noise_reuse

    @property
    def precision(self) -> str | Feedback:
        """How parameters shorter than float32 are updated."""
        return self.es.precision

    @property
    def sigma(self) -> Any:
        """Standard deviation of the perturbation."""
        return self.es.sigma

    @property
    def shaping(self) -> Any:
        """How fitness becomes coefficients."""
        return self.es.shaping

    @property
    def perturbation(self) -> Any:
        """Noise of the parameters."""
        return self.es.perturbation


_: type[Strategy[ESState]] = External  # checked by mypy
