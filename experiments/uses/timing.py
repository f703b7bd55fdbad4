"""Times a population against the unperturbed function on the same inputs for as many members, in one process, in turn."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from eggroll.experiments.uses.check import quiet, strategy
from eggroll.experiments.uses.use import Program
from eggroll.noise.rules import Perturbation

SECONDS = 0.4  # of rounds per use, at least three of them
ROUNDS = 15


def time_ratios(
    program: Program, perturbations: Mapping[str, Perturbation], *, members: int, generations: bool = False
) -> dict[str, float]:
    """Time a population of every perturbation: noise and evaluation, with `generations` the update too.

    Args:
        program: what every member evaluates.
        perturbations: name -> noise of the parameters.
        members: N, even; every member has its own copy of the batch.
        generations: whether to time whole generations.

    Returns:
        Name -> seconds of the plain function over those of the population: medians of alternating calls. None at all where
        XLA cannot compile the plain function.
    """
    with quiet():
        batches = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (members, *leaf.shape)).copy(), program.batch)
        try:
            plain = _unperturbed(program, batches)
        except jax.errors.JaxRuntimeError:
            return {}
        form = _generation if generations else _population
        forms = {name: form(program, batches, noise, members) for name, noise in perturbations.items()}
        seconds = _interleaved_seconds({"": plain, **forms})
    return {name: seconds[""] / seconds[name] for name in perturbations}


def _unperturbed(program: Program, batches: Any) -> Callable[[], Any]:
    """The plain function, mapped over the members; one after the other where JAX has no batched form of it."""
    batched = jax.jit(jax.vmap(program.function, (None, 0)))
    try:
        jax.block_until_ready(batched(program.params, batches))
    except NotImplementedError:
        batched = jax.jit(lambda params, batches: jax.lax.map(lambda batch: program.function(params, batch), batches))
        jax.block_until_ready(batched(program.params, batches))
    return lambda: batched(program.params, batches)


def _population(program: Program, batches: Any, perturbation: Perturbation, members: int) -> Callable[[], Any]:
    es = strategy(members, perturbation, members_per_batch=1)
    state = es.init(program.params, key=jax.random.key(5))
    es.plan(state, batches, function=program.function)

    @jax.jit
    def forward(state: Any, batches: Any) -> Any:
        return es.evaluate(state, batches, function=lambda params, batch, key, member_state: program.function(params, batch))

    return lambda: forward(state, batches)


def _generation(program: Program, batches: Any, perturbation: Perturbation, members: int) -> Callable[[], Any]:
    def fitness(params: Any, batch: Any, key: jax.Array) -> jax.Array:
        return jnp.stack([jnp.mean(leaf, dtype=jnp.float32) for leaf in jax.tree.leaves(program.function(params, batch))]).sum()

    es = strategy(members, perturbation, fitness=fitness, members_per_batch=1)
    states = [es.init(program.params, key=jax.random.key(5))]

    def step() -> Any:
        states[0], metrics = es.step(states[0], batches)
        return metrics

    return step


def _interleaved_seconds(forms: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Median seconds of every form, called in turn after two calls each."""
    for form in forms.values():
        jax.block_until_ready(form())
    start = time.perf_counter()
    for form in forms.values():
        jax.block_until_ready(form())
    rounds = min(ROUNDS, max(3, int(SECONDS / (time.perf_counter() - start))))
    found: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, form in forms.items():
            start = time.perf_counter()
            jax.block_until_ready(form())
            found[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in found.items()}
