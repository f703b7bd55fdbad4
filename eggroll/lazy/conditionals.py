"""Conditionals of a population: `cond` and `switch` whose branches use perturbed parameters.

When members disagree about the branch, JAX evaluates all branches and selects, but first gives every member a copy of every
operand, weights included. Here only the results are selected, so a shared weight stays one array; when all members agree, one
branch runs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.custom_batching import custom_vmap
from jax.typing import ArrayLike

from eggroll.lazy.perturbed import LazyArray, PerturbedArray, is_perturbed, register, run_with_rules, to_plain


@register(jax.lax.cond_p, precedence=1)
def _cond(index: ArrayLike, *operands: LazyArray | ArrayLike, branches, **params):
    if not any(map(is_perturbed, operands)) or params.get("branches_platforms"):
        return PerturbedArray.default(jax.lax.cond_p, [index, *operands], {"branches": branches, **params})
    leaves, tree = jax.tree.flatten(operands)

    def flat_branch(branch):
        def run(*leaves):
            outputs = run_with_rules(branch)(jax.tree.unflatten(tree, leaves))
            return [to_plain(output, "the result of a conditional") for output in outputs]

        return run

    return _switch([flat_branch(branch) for branch in branches])(index, *leaves)


def _switch(branches: Sequence[Callable]) -> Callable:
    """`switch(index, *leaves)` over flat branches, which keeps shared operands shared under vmap."""

    @custom_vmap
    def switch(index, *leaves):
        return jax.lax.switch(index, branches, *leaves)

    @switch.def_vmap
    def _batched(axis_size: int, in_batched: Sequence[bool], index: Any, *leaves: Any):
        axes = [0 if batched else None for batched in in_batched]
        if in_batched[0]:
            outputs = jax.vmap(_select(branches), in_axes=axes, axis_size=axis_size)(index, *leaves)
        else:
            per_member = [jax.vmap(branch, in_axes=axes[1:], axis_size=axis_size) for branch in branches]
            outputs = _switch(per_member)(index, *leaves)
        return outputs, [True] * len(outputs)

    return switch


def _select(branches: Sequence[Callable]) -> Callable:
    def select(index, *leaves):
        results = [branch(*leaves) for branch in branches]
        return [jax.lax.select_n(index, *outputs) for outputs in zip(*results, strict=True)]

    return select
