"""The table: every use by its family, and the choice of some by name."""

import fnmatch
from types import ModuleType

from eggroll.experiments.uses import (
    algebra,
    fitness,
    layers,
    libraries,
    lookups,
    loops,
    models,
    products,
    sequences,
    transformations,
    views,
)
from eggroll.experiments.uses.use import Use

FAMILIES: dict[str, ModuleType] = {
    "products": products,
    "lookups": lookups,
    "layers": layers,
    "loops": loops,
    "views": views,
    "fitness": fitness,
    "algebra": algebra,
    "models": models,
    "sequences": sequences,
    "transformations": transformations,
    "libraries": libraries,
}
USES: dict[str, Use] = {use.name: use for family in FAMILIES.values() for use in family.USES}
FAMILY = {use.name: name for name, family in FAMILIES.items() for use in family.USES}
COMPARED = (  # timed with dense noise, too
    "MLP with an L2 penalty",
    "RNN with a learnt initial state",
    "w * exp(s)",
    "mixture of experts by ragged_dot",
    "masked layers",
)


def select(pattern: str) -> list[str]:
    """Names of the uses whose name or family matches a glob, contains the pattern if it is none, all if it is empty.

    Raises:
        ValueError: there is none.
    """
    literal = set(pattern).isdisjoint("*?")
    glob = f"*{pattern}*" if literal else pattern
    glob = glob.replace("[", "[[]")
    found = [name for name in USES if fnmatch.fnmatchcase(name, glob) or fnmatch.fnmatchcase(FAMILY[name], glob)]
    if not found:
        raise ValueError(f"only must match the name or the family of a use, got {pattern!r}; families: {', '.join(FAMILIES)}.")
    return found
