"""Regularisers and monitors in the fitness, and what leaves values as they are."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from eggroll.experiments.uses.use import use

W = {"w": "n n"}
MLP = {"a": "n 2n", "b": "2n", "c": "2n n"}


def mlp(p: Any, x: Any) -> Any:
    """Two layers."""
    return jnp.tanh(x @ p["a"] + p["b"]) @ p["c"]


def _loss(p: Any, x: Any) -> Any:
    return -jnp.mean(mlp(p, x) ** 2)


def _l2(p: Any, x: Any) -> Any:
    return _loss(p, x) - 1e-2 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(p))


def _penalty_of_rows(p: Any, x: Any) -> Any:
    """Group lasso."""
    return _loss(p, x) - 1e-2 * jnp.sqrt((p["a"] ** 2).sum(0)).sum()


def _orthogonal(p: Any, x: Any) -> Any:
    return (x @ p["w"]).mean() - 1e-2 * jnp.sum((p["w"].T @ p["w"] - jnp.eye(x.shape[1])) ** 2)


def _distance_to_start(p: Any, x: Any) -> Any:
    """A penalty on the distance to constants."""
    return _loss(p, x) - 1e-2 * jnp.sum((p["c"] - np.float32(0.1)) ** 2)


def _finite(p: Any, x: Any) -> Any:
    return jnp.where(jnp.isfinite(p["w"]).all(), x @ p["w"], 0.0)


def _printed(p: Any, x: Any) -> Any:
    jax.debug.print("norm {}", jnp.sum(x @ p["w"]))
    return x @ p["w"]


def _printed_weights(p: Any, x: Any) -> Any:
    jax.debug.print("weight {}", p["w"])
    return x @ p["w"]


def _called_back(p: Any, x: Any) -> Any:
    jax.debug.callback(lambda w: None, p["w"])
    return x @ p["w"]


def _on_the_host(p: Any, x: Any) -> Any:
    product = x @ p["w"]
    return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(product.shape, product.dtype), product, vmap_method="expand_dims")


def _weights_on_the_host(p: Any, x: Any) -> Any:
    shape = jax.ShapeDtypeStruct(p["w"].shape, p["w"].dtype)
    return x @ jax.pure_callback(np.sin, shape, p["w"], vmap_method="expand_dims")


def _sharded(p: Any, x: Any) -> Any:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), "data")
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return x @ lax.with_sharding_constraint(p["w"], place)


def _logged(p: Any, x: Any) -> Any:
    """Norms returned as auxiliary values."""
    return x @ p["w"], {"norm": jnp.linalg.norm(p["w"])}


USES = (
    use("MLP with an L2 penalty", MLP, _l2),
    use("sum(w ** 2)", W, lambda p, x: (x @ p["w"]).mean() - jnp.sum(p["w"] ** 2)),
    use("sum(abs(w))", W, lambda p, x: (x @ p["w"]).mean() - jnp.sum(jnp.abs(p["w"]))),
    use("max(abs(w))", W, lambda p, x: (x @ p["w"]).mean() - jnp.max(jnp.abs(p["w"]))),
    use("group lasso", MLP, _penalty_of_rows),
    use("global norm of the tree", MLP, lambda p, x: _loss(p, x) - 0.1 * optax.tree.norm(p)),
    use("vdot(w, w)", W, lambda p, x: (x @ p["w"]).mean() - 0.1 * jnp.vdot(p["w"], p["w"])),
    use("orthogonality penalty", W, _orthogonal),
    use("distance to a constant", MLP, _distance_to_start),
    use("mean of a weight", W, lambda p, x: x @ p["w"] + p["w"].mean()),
    use("sum of columns", W, lambda p, x: x @ p["w"] + p["w"].sum(0)),
    use("trace", W, lambda p, x: x @ p["w"] + jnp.trace(p["w"])),
    use("isfinite", W, _finite),
    use("norm as an auxiliary output", W, _logged),
    use("debug.print of a product", W, _printed),
    use("debug.print of weights", W, _printed_weights),
    use("debug.callback of weights", W, _called_back),
    use("pure_callback of a product", W, _on_the_host),
    use("pure_callback of weights", W, _weights_on_the_host, expected="built"),
    use("optimization_barrier", W, lambda p, x: x @ lax.optimization_barrier(p["w"])),
    use("device_put", W, lambda p, x: x @ jax.device_put(p["w"])),
    use("sharding constraint", W, _sharded),
    use("stop_gradient", W, lambda p, x: x @ lax.stop_gradient(p["w"])),
    use("copy", W, lambda p, x: x @ jnp.array(p["w"], copy=True)),
    use("checkpoint_name", W, lambda p, x: x @ checkpoint_name(p["w"], "weights")),
    use("weights returned as they are", W, lambda p, x: (x @ p["w"], p["w"])),
    use("weights returned alone", W, lambda p, x: p["w"], expected="built"),
    use("shape of a weight only", {"w": "n n", "u": "n n"}, lambda p, x: x @ p["w"] * p["u"].shape[0]),
    use("weights times zero", {"w": "n n", "u": "n n"}, lambda p, x: x @ p["w"] + 0.0 * jnp.sum(x @ p["u"])),
    use("comparison with a threshold", {"w": "n n", "t": ""}, lambda p, x: (x @ p["w"] > p["t"], x @ p["w"])),
    use("argmax of logits", W, lambda p, x: jnp.argmax(x @ p["w"], -1)),
    use("argsort of scores", W, lambda p, x: jnp.argsort(x @ p["w"], axis=-1)),
    use("random sampling from logits", W, lambda p, x: jax.random.categorical(jax.random.key(0), x @ p["w"])),
)
