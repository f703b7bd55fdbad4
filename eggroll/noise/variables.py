"""Which leaves of a params tree belong to a collection that does not hold parameters, such as the statistics of BatchNorm.

Two signs are read, and no others: siblings of the top-level key "params" in a dict or FrozenDict, as linen's `init` returns
them, and `nnx.Variable`s whose type is not derived from `nnx.Param`. Names further down mean nothing. What becomes of such a
leaf is decided by `rules.match_rules`.
"""

import dataclasses
import sys
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Collection:
    """A collection that does not hold parameters."""

    name: str  # key of the collection, or name of the variables' type
    kind: str  # how it was recognised


SIBLINGS, VARIABLES = "siblings of 'params'", "variables that are not nnx.Param"


def collections(params: Any) -> list[Collection | None]:
    """Return the collection of every leaf, in leaf order; None for parameters."""
    nnx = sys.modules.get("flax.nnx")  # without flax there are no such trees
    variable = getattr(nnx, "Variable", ())
    parameter = getattr(nnx, "Param", ())
    siblings = _has_siblings(params)
    found: list[Collection | None] = []
    for path, node in jax.tree.leaves_with_path(params, is_leaf=lambda node: isinstance(node, variable)):
        own = None
        if siblings and path[0].key != "params":
            own = Collection(str(path[0].key), SIBLINGS)
        elif isinstance(node, variable) and not isinstance(node, parameter):
            own = Collection(type(node).__name__, VARIABLES)
        found += [own] * len(jax.tree.leaves(node))
    return found


def _has_siblings(params: Any) -> bool:
    frozen_dict = getattr(sys.modules.get("flax.core"), "FrozenDict", dict)
    return isinstance(params, dict | frozen_dict) and "params" in params and len(params) > 1
