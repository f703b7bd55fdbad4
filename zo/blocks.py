"""A model in pieces: what offloading runs one after another, with one block on the device at a time.

    params = {"resident": embeddings, norms, head ..., "blocks": every leaf with a leading axis of L blocks}
    x, aux = begin(resident, batch, key)
    x = block(params of block l, x, aux)         l = 0 ... L - 1
    loss = end(resident, x, batch)               a scalar, or (total, weight)

A tied embedding is one leaf of "resident", used by `begin` and by `end`, with one noise.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eggroll.noise.factored import FactoredLeaf
from eggroll.noise.leaves import DenseLeaf, LeafPlan
from eggroll.noise.plan import Plan

PREFIX = "blocks/"


class Blocks(NamedTuple):
    """The pieces; pure functions."""

    begin: Callable  # begin(resident, batch, key) -> (x, aux); aux (masks, positions, a key) must not depend on parameters
    block: Callable  # block(params of one block, x, aux) -> x, of the shape and dtype that it came in
    end: Callable  # end(resident, x, batch) -> loss, or (total, weight)


def check_blocks(params: Any) -> int:
    """Return the number of blocks.

    Raises:
        ValueError: `params` is not {"resident": ..., "blocks": ...} with one leading axis size in all leaves of "blocks".
    """
    if not isinstance(params, dict) or set(params) != {"resident", "blocks"}:
        names = sorted(params) if isinstance(params, dict) else type(params).__name__
        raise ValueError(f'params of Blocks must be {{"resident": ..., "blocks": ...}}, got {names}.')
    leaves = jax.tree_util.tree_leaves_with_path(params["blocks"])
    sizes = {jax.tree_util.keystr(path): leaf.shape[:1] for path, leaf in leaves}
    if not sizes or len(set(sizes.values())) != 1 or () in sizes.values():
        raise ValueError(f"blocks must be stacked, every leaf with the same leading axis; the leading axes are {sizes}.")
    count = next(iter(sizes.values()))[0]
    if not count:
        raise ValueError("there must be one block or more, got leaves of 0.")
    return count


def whole_loss(blocks: Blocks) -> Callable:
    """The loss as one function `loss(params, batch, key)`, for a device that holds all of the model."""

    def loss(params: Any, batch: Any, key: jax.Array) -> Any:
        x, aux = blocks.begin(params["resident"], batch, key)
        x, _ = jax.lax.scan(lambda x, own: (blocks.block(own, x, aux), None), x, params["blocks"])
        return blocks.end(params["resident"], x, batch)

    return loss


def total_and_weight(result: Any) -> tuple[jax.Array, jax.Array]:
    """A loss as float32 total and weight.

    Raises:
        ValueError: it is neither a real scalar nor (total, weight).
    """
    parts = result if isinstance(result, tuple) else (result, 1.0)
    if len(parts) != 2 or not all(map(_is_real, parts)):
        got = ", ".join(_described(part) for part in (result if isinstance(result, tuple) else (result,)))
        raise ValueError(f"loss must be a scalar or (total, weight), got {got or 'an empty tuple'}.")
    total, weight = (jnp.asarray(part).astype(jnp.float32) for part in parts)
    return total, weight


def _is_real(value: Any) -> bool:
    is_number = isinstance(value, int | float) or hasattr(value, "dtype")
    return is_number and jnp.shape(value) == () and not jnp.issubdtype(jnp.result_type(value), jnp.complexfloating)


def _described(value: Any) -> str:
    return f"{value.dtype}{list(value.shape)}" if hasattr(value, "dtype") else f"a {type(value).__name__}"


def stacked_plan(plan: Plan) -> Plan:
    """The plan of a model in pieces: dense noise of a stacked parameter has an address for every block too, and so has what
    has low-rank noise across the blocks otherwise.
    """

    def stacked(leaf: LeafPlan) -> LeafPlan:
        if not leaf.path.startswith(PREFIX):
            return leaf
        if isinstance(leaf, FactoredLeaf) and leaf.stack[:1] != (0,):  # factors over the blocks, of vectors such as norms
            about = leaf.path, leaf.shape, leaf.dtype, leaf.spec
            leaf = DenseLeaf(*about, "a vector of every block", leaf.converted)
        return dataclasses.replace(leaf, stack=(0,)) if isinstance(leaf, DenseLeaf) else leaf

    return dataclasses.replace(plan, leaves=tuple(stacked(leaf) for leaf in plan.leaves))


def split_plan(plan: Plan, params: Any) -> tuple[Plan, Plan]:
    """The plans of the resident parameters and of ONE block, whose noise is that of the whole plan at its stack index."""

    def one(leaf: LeafPlan) -> LeafPlan:
        stack, rows, columns = (tuple(axis - 1 for axis in axes if axis > 0) for axes in leaf.axes)
        leaf = dataclasses.replace(leaf, shape=leaf.shape[1:], stack=stack)
        return dataclasses.replace(leaf, rows=rows, columns=columns) if isinstance(leaf, FactoredLeaf) else leaf

    of_blocks = [leaf for leaf in plan.leaves if leaf.path.startswith(PREFIX)]
    if any(len(leaf.stack) > 1 for leaf in of_blocks):
        names = ", ".join(leaf.path for leaf in of_blocks if len(leaf.stack) > 1)
        raise ValueError(f"blocks with stacks of their own cannot be offloaded: {names}.")
    resident = [leaf for leaf in plan.leaves if not leaf.path.startswith(PREFIX)]
    structures = jax.tree.structure(params["resident"]), jax.tree.structure(params["blocks"])
    return Plan(tuple(resident), structures[0]), Plan(tuple(map(one, of_blocks)), structures[1])
