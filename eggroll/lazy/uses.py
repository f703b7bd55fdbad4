"""What a function does with its parameters, as an abstract trace records it; `planning` reads the roles of the leaves here."""

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
