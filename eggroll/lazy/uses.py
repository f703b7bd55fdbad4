"""What a function does with its parameters, as an abstract trace records it, and the errors of uses without a rule.

`planning` reads the roles of the leaves here. An error names the parameter and what to write instead.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp


class Use(NamedTuple):
    """One use of a parameter: its source axes that were contracted, left free, stacked; or why the use has no rule.

    A use without a rule reads `size` entries; `stacked` are then the axes that a scan slices.
    """

    contracted: frozenset[int] = frozenset()
    free: frozenset[int] = frozenset()
    stacked: frozenset[int] = frozenset()
    unsupported: str | None = None
    size: int = 0


class Observer:
    """Collects the uses of every probed parameter during a trace, and the dtypes that quantised ones are converted to."""

    def __init__(self) -> None:
        self.uses: dict[str, list[Use]] = {}
        self.dtypes: dict[str, list[Any]] = {}

    def record(self, path: str, use: Use) -> None:
        """Add one use of the parameter at `path`."""
        self.uses.setdefault(path, []).append(use)

    def convert(self, path: str, dtype: Any) -> None:
        """Add one conversion of the quantised parameter at `path`."""
        self.dtypes.setdefault(path, []).append(jnp.dtype(dtype))

    def widest(self, path: str) -> Any:
        """The widest dtype that the quantised parameter at `path` is converted to, float32 where none was seen."""
        return max(self.dtypes.get(path, []), key=lambda dtype: dtype.itemsize, default=jnp.dtype(jnp.float32))


class UseError(ValueError):
    """A parameter is used in a way that its perturbation does not allow."""


class UnsupportedUse(UseError):
    """A parameter planned as low-rank is used in a way that has no rule."""

    def __init__(self, path: str, where: str):
        self.path, self.where = path, where
        super().__init__(
            f"Parameter '{path}' is planned as low-rank but the function uses it in {where}, which has no low-rank rule; "
            f"put the rule ('{path}', eggroll.Dense()) first in `perturbation`."
        )


class UnconvertedUse(UseError):
    """An int8 parameter with floating noise is used in arithmetic before its conversion to a float."""

    def __init__(self, path: str, where: str):
        super().__init__(
            f"int8 parameter '{path}' has floating noise but is used in {where} before it is a float: write "
            "param.astype(x.dtype) first, or give it the rule Integer() or Frozen()."
        )


class FailedUse(UseError):
    """The rule of a primitive raised an error, or the primitive itself did, with a perturbed parameter as an operand."""

    def __init__(self, paths: Sequence[str], primitive: str, error: Exception):
        names = " and ".join(f"'{path}'" for path in paths)
        reason = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        super().__init__(
            f"'{primitive}' failed with perturbed parameter {names}, where the function alone could be traced: "
            f"{type(error).__name__}: {reason}. Put the rule ('{paths[0]}', eggroll.Dense()) first in `perturbation`."
        )
