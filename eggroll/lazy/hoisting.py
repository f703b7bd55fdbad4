"""Hoists transposes of loop-invariant arrays out of loops.

`vmap` of a loop over time around a scan over layers puts the population's axis first in every stacked array, and the scan needs
the layers first: the inner loop's inputs are transposed again on every iteration of the outer one, and XLA does not hoist them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.extend.core as jexc


def hoist_transposes(function: Callable) -> Callable:
    """Make the function that gives the same values, with transposes of a loop's constants before the loop.

    Args:
        function: any JAX function of pytrees of arrays; loops inside other calls than loops stay as they are.
    """

    def call(*args: Any) -> Any:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        return jax.tree.unflatten(jax.tree.structure(shapes), _evaluate(closed, jax.tree.leaves(args), {}))

    return call


def _evaluate(closed: Any, leaves: Sequence[Any], known: Mapping[Any, Any]) -> list:
    """Outputs of a program; equations whose results are `known` are not evaluated."""
    environment = dict(known)
    environment.update(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    environment.update(zip(closed.jaxpr.invars, leaves, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jexc.Literal) else environment[atom]

    for equation in closed.jaxpr.eqns:
        if equation.outvars and all(variable in known for variable in equation.outvars):
            continue
        inputs = [read(atom) for atom in equation.invars]
        if equation.primitive.name in _LOOPS:
            outputs = _LOOPS[equation.primitive.name](inputs, **equation.params)
        else:
            outputs = equation.primitive.bind(*inputs, **equation.primitive.get_bind_params(equation.params))
        outputs = outputs if equation.primitive.multiple_results else [outputs]
        environment.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in closed.jaxpr.outvars]


def _scan(inputs: list, *, jaxpr: Any, length: int, reverse: bool, unroll: int, **grouping: Any) -> list:
    consts, first, sliced = grouped(inputs, **grouping)
    known = _transposed(jaxpr.jaxpr, consts)

    def step(carry: list, xs: list) -> tuple[list, list]:
        outputs = _evaluate(jaxpr, [*consts, *carry, *xs], known)
        return outputs[: len(first)], outputs[len(first) :]

    carry, ys = jax.lax.scan(step, first, sliced, length=length, reverse=reverse, unroll=unroll)
    return [*carry, *ys]


def grouped(inputs: list, **grouping: Any) -> list[list]:
    """A scan's constants, first carry and sliced inputs; since jax 0.11 a tree tells them apart, before it counts do."""
    if "ft_in" in grouping:
        return [list(group.vals) for group in grouping["ft_in"].update(inputs).unpack()]
    consts = grouping["num_consts"]
    end = consts + grouping["num_carry"]
    return [inputs[:consts], inputs[consts:end], inputs[end:]]


def _while(inputs: list, *, cond_jaxpr: Any, cond_nconsts: int, body_jaxpr: Any, body_nconsts: int) -> list:
    end = cond_nconsts + body_nconsts
    for_cond, consts, carry = inputs[:cond_nconsts], inputs[cond_nconsts:end], inputs[end:]
    moved = _transposed(body_jaxpr.jaxpr, consts)
    more = body_nconsts + len(moved)

    def body(*leaves: Any) -> list:
        known = dict(zip(moved, leaves[body_nconsts:more], strict=True))
        return _evaluate(body_jaxpr, [*leaves[:body_nconsts], *leaves[more:]], known)

    avals = [jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=a.weak_type) for a in body_jaxpr.in_avals]
    new = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in moved.values()]
    rewritten = jax.make_jaxpr(body)(*avals[:body_nconsts], *new, *avals[body_nconsts:])
    # Bound directly: under vmap the condition may have an axis of members, which `jax.lax.while_loop` does not take.
    known = {"cond_nconsts": cond_nconsts, "cond_jaxpr": cond_jaxpr, "body_nconsts": more, "body_jaxpr": rewritten}
    return jax.lax.while_p.bind(*for_cond, *consts, *moved.values(), *carry, **known)


_LOOPS: dict[str, Callable] = {"scan": _scan, "while": _while}


def _transposed(jaxpr: Any, consts: Sequence[Any]) -> dict[Any, Any]:
    """The results of the transposes in a loop's body of what is constant there, its first inputs."""
    outside = dict(zip(jaxpr.invars, consts, strict=False))
    found: dict[Any, Any] = {}
    for equation in jaxpr.eqns:
        if equation.primitive.name == "transpose" and equation.invars[0] in outside:
            moved = equation.primitive.bind(outside[equation.invars[0]], **equation.params)
            found[equation.outvars[0]] = outside[equation.outvars[0]] = moved
    return found
