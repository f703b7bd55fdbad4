"""The optimizers whose memory is measured."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def store_in_bfloat16(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keep every float of an optimizer's state in bfloat16, and compute in float32.

    `optax.adam(mu_dtype=jnp.bfloat16)` covers the first moment only. Rounding to nearest loses changes of less than 2^-9, and
    with b2 = 0.999 the second moment changes by about 2^-10: this serves to count bytes, not to train.
    """

    def init(params: Any) -> Any:
        return _cast(optimizer.init(params), jnp.bfloat16)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = optimizer.update(updates, _cast(state, jnp.float32), params)
        return updates, _cast(state, jnp.bfloat16)

    return optax.GradientTransformation(init, update)


def _cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree)


OPTIMIZERS = {
    "sgd": optax.sgd(1e-3),
    "adam": optax.adam(1e-3),
    "adam_bfloat16": store_in_bfloat16(optax.adam(1e-3)),
}
