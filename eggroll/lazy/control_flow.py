"""Loops and conditionals of one member whose operands may be lazy parameters.

A carry stays lazy if it is the same view of the same parameter before and after the body (its scale may change). A carry that
starts as, becomes or stops being another value is built by the members, or the plan gives the parameter dense noise.

When members disagree about a branch, JAX evaluates all branches and selects, but first gives every member a copy of every
operand, weights included. Here only the results are selected, so a shared weight stays one array; when all members agree, one
branch runs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jexc
from jax import Array
from jax.custom_batching import custom_vmap
from jax.typing import ArrayLike

from eggroll.lazy.forward_only import run_with_rules
from eggroll.lazy.hoisting import grouped
from eggroll.lazy.perturbed import LazyArray, PerturbedArray, is_perturbed, register, to_plain


@register(jax.lax.scan_p, precedence=1)
def _scan(*inputs: LazyArray | ArrayLike, jaxpr: Any, length: int, reverse: bool, unroll: int, **grouping: Any) -> list:
    if not any(map(is_perturbed, inputs)):
        grouping |= {"jaxpr": jaxpr, "length": length, "reverse": reverse, "unroll": unroll}
        return jax.lax.scan_p.bind(*inputs, **grouping)
    consts, first, sliced = grouped(list(inputs), **grouping)
    sliced = [value.sliceable() if is_perturbed(value) else value for value in sliced]
    evaluate = run_with_rules(jaxpr)

    def body(consts: list, carry: list, xs: list) -> tuple[list, list]:
        xs = [x.prepare_slice() if is_perturbed(x) else x for x in xs]
        outputs = evaluate([*consts, *carry, *xs])
        return outputs[: len(first)], [to_plain(y, "the stacked results of 'scan'") for y in outputs[len(first) :]]

    slices = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), sliced)
    carry, traced = _settle(body, consts, first, slices, name="scan")
    run = jexc.jaxpr_as_fun(traced)
    leaves, tree = jax.tree.flatten(carry)
    const_leaves, xs = jax.tree.leaves(consts), jax.tree.leaves(sliced)

    def step(leaves: list, xs: list) -> tuple[list, list]:
        outputs = run(*const_leaves, *leaves, *xs)
        return outputs[: len(leaves)], outputs[len(leaves) :]

    leaves, ys = jax.lax.scan(step, leaves, xs, length=length, reverse=reverse, unroll=unroll)
    return [*jax.tree.unflatten(tree, leaves), *ys]


@register(jax.lax.while_p, precedence=1)
def _while(*inputs: LazyArray | ArrayLike, cond_jaxpr: Any, cond_nconsts: int, body_jaxpr: Any, body_nconsts: int) -> list:
    if not any(map(is_perturbed, inputs)):
        counts = {"cond_nconsts": cond_nconsts, "body_nconsts": body_nconsts}
        return jax.lax.while_p.bind(*inputs, cond_jaxpr=cond_jaxpr, body_jaxpr=body_jaxpr, **counts)
    end = cond_nconsts + body_nconsts
    for_cond, consts, first = inputs[:cond_nconsts], inputs[cond_nconsts:end], inputs[end:]
    evaluate, check = run_with_rules(body_jaxpr), run_with_rules(cond_jaxpr)
    carry, traced = _settle(lambda consts, carry, _: (evaluate([*consts, *carry]), []), consts, first, [], name="while")
    leaves, tree = jax.tree.flatten(carry)
    cond_leaves, cond_tree = jax.tree.flatten(list(for_cond))
    const_leaves = jax.tree.leaves(list(consts))

    def condition(*given: Any) -> Array:
        known = jax.tree.unflatten(cond_tree, given[: len(cond_leaves)])
        (output,) = check([*known, *jax.tree.unflatten(tree, given[len(cond_leaves) :])])
        return to_plain(output, "the condition of 'while'")

    # Bound directly: in a vmap of the user's the condition may have an axis, which `jax.lax.while_loop` does not take.
    leaves = jax.lax.while_p.bind(
        *cond_leaves,
        *const_leaves,
        *leaves,
        cond_nconsts=len(cond_leaves),
        cond_jaxpr=jax.make_jaxpr(condition)(*cond_leaves, *leaves),
        body_nconsts=len(const_leaves),
        body_jaxpr=traced,
    )
    return jax.tree.unflatten(tree, leaves)


def _settle(
    body: Callable[[list, list, list], tuple[list, list]],
    consts: Sequence[Any],
    carry: Sequence[Any],
    slices: list,
    *,
    name: str,
) -> tuple[list, jexc.ClosedJaxpr]:
    """Read the carries that are not the same before and after `body(consts, carry, slices)`, until all are.

    Returns:
        The first carry, and the program from the leaves of constants, carry and slices to the leaves of the next carry and of
        the other results.
    """
    where = f"a carry of '{name}' that is not the same view of one parameter on every iteration"
    consts, carry = list(consts), [value.unpack() if is_perturbed(value) else value for value in carry]

    def read(value: Any) -> Any:
        return to_plain(value, where, reason=f"used in {where}")

    def turn(consts: list, carry: list, slices: list) -> tuple[list, list]:
        after, others = body(consts, carry, slices)
        pairs = zip(carry, after, strict=True)
        return [(new.unpack() if is_perturbed(new) else new) if is_perturbed(old) else read(new) for old, new in pairs], others

    while True:
        traced, (after, _) = jax.make_jaxpr(turn, return_shape=True)(consts, carry, slices)
        same = [_structure(old) == _structure(new) for old, new in zip(carry, after, strict=True)]
        if all(same):
            break
        carry = [old if stays else read(old) for stays, old in zip(same, carry, strict=True)]

    return carry, traced


def _structure(value: Any) -> Any:
    """What has to be the same on every iteration; JAX compares plain carries itself."""
    if not is_perturbed(value):
        return None
    leaves, tree = jax.tree.flatten(value)
    return tree, [(leaf.shape, leaf.dtype) for leaf in leaves]


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
