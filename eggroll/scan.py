"""Several generations in one compiled program: a loop on the device around `step`.

    state, batch, metrics = run_scan(es, state, batch, count=50, length=50)

The bits are those of `step`: the loop traces the same functions, and what one hands to the other is rounded once
(`noise.once`), so that the compiler does not fuse it into its reader. `runs.advance` compares the first scan of a durable run.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from eggroll import programs
from eggroll.population.metrics import Metrics
from eggroll.protocol import S, Strategy
from eggroll.state import begin

NextBatch = Callable[[Any, Metrics], Any]  # (batch of a generation, its metrics without the fitness) -> batch of the next


def check_scannable(es: Strategy[Any]) -> None:
    """Raise ValueError for a strategy whose generations do not run on one device from beginning to end."""
    if getattr(es, "placement", es) is not None:
        why = "has a mesh" if hasattr(es, "placement") else "runs part of a generation on the host"
        raise ValueError(f"on_device needs whole generations on one device, but {type(es).__name__} {why}: leave it out.")


def run_scan(
    es: Strategy[S],
    state: S,
    batch: Any,
    *,
    count: int,
    length: int,
    stacked: bool = False,
    next_batch: NextBatch | None = None,
) -> tuple[S, Any, Metrics]:
    """Run several generations.

    Args:
        es: `EvolutionStrategy` or `ZerothOrder`, without a mesh.
        state: consumed.
        batch: of the first generation, or of all.
        count: generations, 1 <= count <= length; another count compiles nothing.
        length: generations that the results have room for; another length is another program.
        stacked: `batch` has leaves [length, ...], an entry for each generation.
        next_batch: makes the batch of the next generation; JAX code. None: all have the same, or are stacked.

    Returns:
        `(state, batch, metrics)`: the batch that follows, and metrics with a leading axis [length], zero from `count` on and
        without the fitness. With `next_batch` the batch is stacked, too: [length, ...], after each generation.

    Raises:
        ValueError: the strategy cannot be scanned; `count` or a stacked batch does not fit `length`; `next_batch` comes with
            stacked batches, or returns a batch of other shapes.
    """
    check_scannable(es)
    if not 1 <= count <= length:
        raise ValueError(f"count must be from 1 to length, {length}, got {count}.")
    if stacked and next_batch is not None:
        raise ValueError("next_batch makes all batches but the first, which batch must then be: leave stacked out.")
    if stacked and any(jnp.shape(leaf)[:1] != (length,) for leaf in jax.tree.leaves(batch)):
        raise ValueError(f"a stacked batch needs an entry for each generation: leaves with a leading axis of length, {length}.")
    state = begin(state)
    batch = jax.tree.map(lambda x: jnp.asarray(x, jnp.asarray(x).dtype), batch)  # no weak types in the carry of the loop
    key = ("scan", es, length, stacked, next_batch, programs.signature((state, batch)))
    run = functools.partial(_run, es, length, stacked, next_batch)
    return programs.compile_once(*key, function=run, donate_argnums=0)(state, batch, count)


def _run(
    es: Strategy[S], length: int, stacked: bool, next_batch: NextBatch | None, state: S, batch: Any, count: Array
) -> tuple[S, Any, Metrics]:
    def advance(state: S, batch: Any, is_run: Array) -> tuple[S, Any, Metrics]:
        state, metrics = es.step(state, batch)
        metrics = metrics._replace(fitness=None)
        if next_batch is None:
            return state, batch, metrics
        # A branch is compiled by itself, as it is for `step`: nothing is fused into it.
        follow_up = functools.partial(follow, next_batch)
        return state, jax.lax.cond(is_run, follow_up, lambda batch, metrics: batch, batch, metrics), metrics

    def generation(index: Array, carry: Any) -> Any:
        state, batch, kept = carry
        own = jax.tree.map(lambda leaf: leaf[index], batch) if stacked else batch
        state, following, metrics = advance(state, own, index < count)
        found = metrics if next_batch is None else (metrics, following)
        kept = jax.tree.map(lambda all, one: all.at[index].set(one), kept, found)
        return state, batch if next_batch is None else following, kept

    one = jax.tree.map(lambda leaf: leaf[0], batch) if stacked else batch
    _, following, metrics = jax.eval_shape(advance, state, one, count >= 0)
    found = metrics if next_batch is None else (metrics, following)
    room = jax.tree.map(lambda leaf: jnp.zeros((length, *leaf.shape), leaf.dtype), found)
    state, batch, kept = jax.lax.fori_loop(0, count, generation, (state, batch, room))
    return (state, batch, kept) if next_batch is None else (state, kept[1], kept[0])


def follow(next_batch: NextBatch, batch: Any, metrics: Metrics) -> Any:
    """Return the batch that follows; ValueError where it has other shapes or dtypes."""
    following = next_batch(batch, metrics)
    if programs.signature(following) != programs.signature(batch):
        raise ValueError("next_batch must return a batch of the structure, shapes and dtypes of the one that it is given.")
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, leaf.dtype), following)
