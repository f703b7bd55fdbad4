"""`Population`: the members of one generation as addresses, for fitness that is computed outside JAX (ask and tell)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array

from eggroll.population import draw_pair, member_params

if TYPE_CHECKING:
    from eggroll.strategy import ESState, EvolutionStrategy


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

        Raises:
            ValueError: the batch lacks its leading axis, or the function uses a parameter against the plan.
        """
        strategy = self.strategy
        strategy.plan(self.state, batch, function=function)

        def without_key(params, batch, key, member_state):
            return function(params, batch)

        def run(state, batch):
            outputs = strategy.evaluate(without_key, state._replace(member_state=None), batch, layout=strategy.layout)
            return jax.tree.map(lambda x: x.reshape(strategy.population_size, *x.shape[2:]), outputs)

        return strategy.jitted(("apply", function), run)(self.state, batch)

    def member(self, index: Array | int) -> Any:
        """Build the parameters of one member, index in [0, N); vmap it for a materialised population."""
        strategy, state = self.strategy, self.state
        plan = strategy.known_plan("member")
        noise_key, _, _ = jax.random.split(state.key, 3)
        pair = jnp.asarray(index, jnp.int32) // 2
        drawn = draw_pair(plan, noise_key, state.generation // strategy.noise_reuse, pair)
        sign = 1.0 - 2.0 * (jnp.asarray(index, jnp.int32) % 2).astype(jnp.float32)
        return member_params(plan, state.params, drawn, sign=sign, sigma=strategy.current_sigma(state), lazy=False)
