"""Backprop with Adam, to warm-start small models: linear warm-up, then cosine decay of the step size."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax import Array

from eggroll.runs.progress import progress_line

STEPS_AT_A_TIME = 20


def fit(
    params: Any,
    loss: Callable[[Any, Any], Array],
    batches: Callable[[int], Any],
    *,
    steps: int,
    learning_rate: float,
) -> Any:
    """Minimise a loss, with a progress line.

    Args:
        params: initial parameters.
        loss: (params, batch) -> scalar.
        batches: step -> a pytree of NumPy arrays, of the same shapes in every step.
        steps: of Adam, at least one.
        learning_rate: peak step size, reached after a tenth of the steps.

    Returns:
        The parameters.
    """
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0.0, learning_rate, -(-steps // 10), steps))

    def advance(run: Any, batch: Any) -> Any:
        params, state = run
        value, gradient = jax.value_and_grad(loss)(params, batch)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    run, several = (params, optimizer.init(params)), jax.jit(lambda run, stacked: jax.lax.scan(advance, run, stacked))
    with progress_line("steps of the warm start", steps) as show:
        for first in range(0, steps, STEPS_AT_A_TIME):
            numbers = range(first, min(first + STEPS_AT_A_TIME, steps))
            run, losses = several(run, jax.tree.map(lambda *leaves: np.stack(leaves), *map(batches, numbers)))
            show(numbers.stop, f"loss {float(losses[-1]):.3f}")
    return run[0]
