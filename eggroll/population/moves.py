"""Loops over 2-byte floats that XLA's CPU backend runs without float32 copies of what they read and carry.

The backend has no slices, look-ups and updates of bfloat16 or float16: it converts the whole operand to float32 for them. What
a loop reads from outside, such as the stacked weights of all layers or the embedding, is the same on every iteration, so that
its conversion is hoisted: a copy of twice the size. A cache that a loop carries is converted and written on every iteration.

Here such moves are those of integers of the same width, which need no conversion; a loop carries the integers; and what it
reads from outside is tied to the iteration, so that nothing computed from it is hoisted. XLA drops the tie before it fuses the
reinterpretation of the whole into the move that reads a part.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jexc
import jax.numpy as jnp
import numpy as np
from jax import Array

from eggroll.lazy.hoisting import grouped

_CALLS = ("jit", "pjit")
_MOVES = ("dynamic_slice", "dynamic_update_slice", "gather")


def move_as_integers(function: Callable) -> Callable:
    """Make the function that gives the same bits; on CPU its loops have no float32 copies, and it has no derivative.

    Args:
        function: any JAX function of pytrees of arrays, some of them 2-byte floats; what is inside other calls than loops and
            `jit` stays as it is.
    """

    def call(*args: Any) -> Any:
        if jax.default_backend() != "cpu":
            return function(*args)
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        return jax.tree.unflatten(jax.tree.structure(shapes), _evaluate(closed, jax.tree.leaves(args)))

    return call


def has_narrow_floats(tree: Any) -> bool:
    """Whether a pytree has a 2-byte float."""
    return any(map(_is_narrow, jax.tree.leaves(tree)))


def _evaluate(closed: Any, leaves: Sequence[Any]) -> list:
    """Outputs of a program."""
    environment = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    environment.update(zip(closed.jaxpr.invars, leaves, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jexc.Literal) else environment[atom]

    for equation in closed.jaxpr.eqns:
        name, inputs = equation.primitive.name, [read(atom) for atom in equation.invars]
        if name in _LOOPS and equation.params.get("length") != 0:  # of no layers, nothing can be sliced
            outputs = _LOOPS[name](inputs, **equation.params)
        elif name in _CALLS:
            outputs = _evaluate(equation.params["jaxpr"], inputs)
        elif name in _MOVES and _is_narrow(inputs[0]):
            outputs = _move(equation, inputs)
        else:
            outputs = equation.primitive.bind(*inputs, **equation.primitive.get_bind_params(equation.params))
        outputs = outputs if equation.primitive.multiple_results else [outputs]
        environment.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in closed.jaxpr.outvars]


def _move(equation: Any, inputs: list) -> Array:
    """A move of an array, and of what is written into it."""
    params, dtype = equation.params, inputs[0].dtype
    if params.get("fill_value") is not None:
        params = params | {"fill_value": int(np.asarray(params["fill_value"], dtype).view(np.uint16))}
    return _as_float(equation.primitive.bind(*map(_as_integer, inputs), **params), inputs[0])


def _scan(inputs: list, *, jaxpr: Any, length: int, reverse: bool, unroll: int, **grouping: Any) -> list:
    consts, first, sliced = grouped(inputs, **grouping)
    results = jaxpr.out_avals[len(first) :]

    def step(carry: list, xs: tuple[Array, list]) -> tuple[list, list]:
        number, wide = xs
        outside = _tie([*consts, *filter(_is_narrow, sliced)], number)
        stacks, others = iter(outside[len(consts) :]), iter(wide)
        own = [_slice(next(stacks), number) if _is_narrow(x) else next(others) for x in sliced]
        outputs = list(map(_as_integer, _evaluate(jaxpr, [*outside[: len(consts)], *map(_as_float, carry, first), *own])))
        return outputs[: len(first)], outputs[len(first) :]

    xs = jnp.arange(length, dtype=jnp.int32), [x for x in sliced if not _is_narrow(x)]
    carry, ys = jax.lax.scan(step, list(map(_as_integer, first)), xs, length=length, reverse=reverse, unroll=unroll)
    return [*map(_as_float, carry, first), *map(_as_float, ys, results)]


def _while(inputs: list, *, cond_jaxpr: Any, cond_nconsts: int, body_jaxpr: Any, body_nconsts: int) -> list:
    end = cond_nconsts + body_nconsts
    first = inputs[end:]
    given = body_jaxpr.jaxpr.invars[body_nconsts:]
    changing = next((i for i, new in enumerate(body_jaxpr.jaxpr.outvars) if new is not given[i]), None)

    def body(*leaves: Any) -> list:
        carry = list(map(_as_float, leaves[body_nconsts:], first))
        outside = leaves[:body_nconsts] if changing is None else _tie(leaves[:body_nconsts], carry[changing])
        return list(map(_as_integer, _evaluate(body_jaxpr, [*outside, *carry])))

    def condition(*leaves: Any) -> list:
        return _evaluate(cond_jaxpr, [*leaves[:cond_nconsts], *map(_as_float, leaves[cond_nconsts:], first)])

    carry = list(map(_as_integer, first))
    shapes = list(map(jax.typeof, carry))
    # Bound directly: under vmap the condition may have an axis of members, which `jax.lax.while_loop` does not take.
    outputs = jax.lax.while_p.bind(
        *inputs[:end],
        *carry,
        cond_nconsts=cond_nconsts,
        cond_jaxpr=jax.make_jaxpr(condition)(*cond_jaxpr.in_avals[:cond_nconsts], *shapes),
        body_nconsts=body_nconsts,
        body_jaxpr=jax.make_jaxpr(body)(*body_jaxpr.in_avals[:body_nconsts], *shapes),
    )
    return list(map(_as_float, outputs, first))


_LOOPS: dict[str, Callable] = {"scan": _scan, "while": _while}


def _tie(arrays: Sequence[Any], iteration: Array) -> list:
    """Arrays from outside a loop; narrow ones depend, for all that XLA can tell, on a value that changes with the iteration."""
    return [jax.lax.optimization_barrier((x, iteration))[0] if _is_narrow(x) and x.ndim else x for x in arrays]


def _slice(stack: Array, number: Array) -> Array:
    return _as_float(jax.lax.dynamic_index_in_dim(_as_integer(stack), number, keepdims=False), stack)


def _is_narrow(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize == 2


def _as_integer(leaf: Any) -> Any:
    return jax.lax.bitcast_convert_type(leaf, jnp.uint16) if _is_narrow(leaf) else leaf


def _as_float(leaf: Any, like: Any) -> Any:
    return jax.lax.bitcast_convert_type(leaf, like.dtype) if _is_narrow(like) else leaf
