"""`Population`: the members of one generation as addresses, for fitness that is computed outside JAX (ask and tell)."""

import dataclasses
from typing import Any, Protocol

from jax import Array


class Apply(Protocol):
    """`apply(function, batch) -> outputs`: apply `function(params, batch)` under every member's perturbation.

    Args:
        function: any JAX function; pass the same object every generation, it is compiled once per object.
        batch: pytree, shared by the members or not as the strategy's `members_per_batch` says.

    Returns:
        The results with a leading axis of N.

    Raises:
        ValueError: the batch lacks its leading axis, or the function uses a parameter against the plan.
    """

    def __call__(self, function: Any, batch: Any = None) -> Any:
        """See the class."""


class Member(Protocol):
    """`member(index) -> params`: build the parameters of one member, index in [0, N); vmap it for a whole population."""

    def __call__(self, index: Array | int) -> Any:
        """See the class."""


@dataclasses.dataclass(frozen=True)
class Population:
    """The members of one generation; made by `EvolutionStrategy.ask`. Nothing is built until it is asked for."""

    size: int  # N
    _: dataclasses.KW_ONLY
    apply: Apply
    member: Member
