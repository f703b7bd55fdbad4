"""Functions of a parameter's noise that an optimizer uses, as an operation that an update can evaluate block by block.

    per_block(function, like, *given)[region] = function(region, *given)

`splitting` reads from `like`, of which only the shape counts, which parameter it belongs to; `split_update` evaluates it in the
regions that are updated. Everywhere else it is an array like any other: the function of the whole parameter.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jexc
from jax import Array
from jax.interpreters import batching, mlir

from eggroll.noise.regions import Region

per_block_p = jexc.Primitive("per_block")


def per_block(function: Callable[..., Array], like: Array, *given: Array) -> Array:
    """Return `function(region, *given)` of the whole of `like`, of its shape.

    Args:
        function: from a region of `like`, and what is given, to the values there.
        like: a gradient or an update of the parameter that the function belongs to.
        *given: arrays that belong to no parameter.

    Raises:
        ValueError: the function uses values that are being traced and are not given.
    """
    whole = Region((0,) * like.ndim, like.shape)
    jaxpr = jax.make_jaxpr(functools.partial(function, whole))(*given)  # also for the digest of the update
    if any(isinstance(constant, jax.core.Tracer) for constant in jaxpr.consts):
        raise ValueError("a function of noise uses traced values that it is not given: pass them as `given`.")
    return per_block_p.bind(like, *given, jaxpr=jaxpr, function=lambda *known: function(*known))  # whose text says nothing


def _of_whole(like: Any, *given: Any, jaxpr: jexc.ClosedJaxpr, **_: Any) -> Any:
    return jexc.jaxpr_as_fun(jaxpr)(*given)[0]


def _abstract(like: Any, *given: Any, jaxpr: jexc.ClosedJaxpr, **_: Any) -> Any:
    return jaxpr.out_avals[0]


def _batched(operands: Sequence[Array], axes: Sequence[int | None], **params: Any) -> tuple[Array, int]:
    return jax.vmap(functools.partial(_of_whole, **params), in_axes=tuple(axes))(*operands), 0


per_block_p.def_impl(_of_whole)
per_block_p.def_abstract_eval(_abstract)
mlir.register_lowering(per_block_p, mlir.lower_fun(_of_whole, multiple_results=False))
batching.primitive_batchers[per_block_p] = _batched
