"""The population: evaluate a one-member function for every perturbed member without building one.

    member (p, s):  theta + s sigma E_p        laid out as [P, 2], signs (+1, -1)

Noise is drawn once per pair; `vmap` runs over the two signs inside and over pairs outside; chunks of pairs run through
`lax.map`, so a population larger than memory is normal.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from eggroll.lazy.hoisting import hoist_transposes
from eggroll.lazy.interpret import apply_perturbed
from eggroll.noise.draws import draw_pair, draw_shared
from eggroll.noise.plan import Plan
from eggroll.population.layout import PopulationLayout
from eggroll.population.members import member_params
from eggroll.population.moves import has_narrow_floats, move_as_integers


def evaluate(
    function: Callable,
    plan: Plan,
    params: Any,
    *,
    layout: PopulationLayout,
    noise_key: Array,
    noise_generation: Array,
    sigma: Array | None,
    evaluation_key: Array,
    batch: Any = None,
    member_state: Any = None,
    first_pair: Array | int = 0,
) -> Any:
    """Run `function` for every member of the population.

    Args:
        function: `function(params, batch, key, member_state) -> pytree`, one member.
        plan: the plan of `params`.
        params: unperturbed parameters.
        layout: how many pairs to evaluate, chunking and the sharing of the batch.
        noise_key: the run's key.
        noise_generation: int32, generation // noise_reuse.
        sigma: float32 scalar; None for integer noise.
        evaluation_key: folded with the pair, unless the layout has `same_key`; both members of a pair get the same key (common
            random numbers).
        batch: pytree, with a leading axis as `layout.members_per_batch` says.
        member_state: pytree with leading axes [P, 2], or None.
        first_pair: index in the population of the first pair of the layout; not 0 on a device that evaluates a part.

    Returns:
        The function's result with leading axes [P, 2], or [P, S] for S signs.
    """
    signs = jnp.asarray(layout.signs, jnp.int32 if plan.is_integer else jnp.float32)
    per_member = layout.members_per_batch == 1
    shared_batch = layout.members_per_batch is None
    shared = draw_shared(plan, noise_key, noise_generation)

    def evaluate_pair(inputs):
        index, own_batch, state = inputs
        pair, own_signs = first_pair + index, signs
        if layout.apart:
            pair, own_signs = pair // len(signs), signs[pair % len(signs)][None]
        pair_noise = draw_pair(plan, noise_key, noise_generation, pair, shared=shared)
        key = evaluation_key if layout.same_key else jax.random.fold_in(evaluation_key, pair)

        def evaluate_member(sign, member_batch, state):
            member = member_params(plan, params, pair_noise, sign=sign, sigma=sigma)
            return apply_perturbed(function, member, member_batch, key, state)

        if shared_batch:
            own_batch = batch
        elif not per_member:
            own_batch = jax.tree.map(lambda x: x[index // (layout.members_per_batch // 2)], batch)
        return jax.vmap(evaluate_member, in_axes=(0, 0 if per_member else None, 0))(own_signs, own_batch, state)

    by_pair = jax.tree.map(lambda x: x.reshape(-1, len(layout.signs), *x.shape[1:]), batch) if per_member else None
    inputs = (jnp.arange(layout.num_pairs, dtype=jnp.int32), by_pair, member_state)

    def evaluate_all(inputs):
        if layout.is_chunked:
            return jax.lax.map(evaluate_pair, inputs, batch_size=layout.chunk_pairs)
        return jax.vmap(evaluate_pair)(inputs)

    run = hoist_transposes(evaluate_all)
    return (move_as_integers(run) if has_narrow_floats((params, batch, member_state)) else run)(inputs)
