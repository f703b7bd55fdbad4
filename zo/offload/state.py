"""The state of an offloaded run, whose last update is pending."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from eggroll.state import check_not_consumed
from eggroll.update.history import History
from eggroll.zo.offload.devices import Sliced, is_sliced
from eggroll.zo.optimizers.descent import ProjectedMoment


class Pending(NamedTuple):
    """An update not yet applied to the parameters."""

    coefficients: Array  # float32 [n], -d
    generation: Array  # int32 [], of its noise
    sigma: Array  # float32 [], standard deviation of its noise
    rate: Array  # float32 [], learning rate of its step; 0: nothing is pending
    scale: Array  # float32 [], of the second moment
    history: History | None = None  # of `Descent(adam=...)`: the steps that were not skipped


class OffloadState(NamedTuple):
    """State of an offloaded run: a pytree."""

    resident: Any  # on every device
    blocks: tuple[Any, ...]  # a pytree of `Sliced` for each of L blocks, in the host's memory
    pending: Pending
    moment: ProjectedMoment
    key: Array  # typed threefry key of the run
    generation: Array  # int32 []
    sigma: Array  # float32 []

    @property
    def member_state(self) -> None:
        """Offloaded members carry nothing."""

    @property
    def params(self) -> dict[str, Any]:
        """Everything that determines the parameters: the stored ones and the update they still lack."""
        return {"resident": self.resident, "blocks": self.blocks, "pending": self.pending}

    @property
    def is_pending(self) -> bool:
        """Whether an update is pending."""
        return bool(self.pending.rate)

    @property
    def shapes(self) -> Any:
        """Shapes of the parameters, in the dtypes of the model's computation."""
        count = len(self.blocks)

        def stacked(leaf: Sliced) -> Any:
            return jax.eval_shape(leaf.typed, jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype))

        blocks = jax.tree.map(stacked, self.blocks[0], is_leaf=is_sliced)
        return {"resident": jax.eval_shape(lambda x: x, self.resident), "blocks": blocks}


def begin(state: OffloadState) -> OffloadState:
    """As `eggroll.state.begin`."""
    check_not_consumed(state)
    return state._replace(sigma=jnp.asarray(state.sigma, jnp.float32))
