"""Feed-forward models and mixtures of experts, written out."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from eggroll.experiments.uses.use import Draw, ids, use

ONES = Draw("n", near=1.0, times=0.1)
EXPERTS = {"router": "n 4", "up": "4 n n", "down": "4 n n"}
IMAGES = "b 8 8 4"
DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def _norm(x: Any) -> Any:
    return (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)


def _mlp(p: Any, x: Any) -> Any:
    for name in ("a", "b", "c"):
        x = jax.nn.relu(x @ p[name]["w"] + p[name]["bias"])
    return x


def _swiglu(p: Any, x: Any) -> Any:
    return (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]


def _fused_swiglu(p: Any, x: Any) -> Any:
    """Gate and up in one matrix, split after the product."""
    gate, up = jnp.split(x @ p["both"], 2, axis=-1)
    return (jax.nn.silu(gate) * up) @ p["down"]


def _normed(norm: Any) -> Any:
    return lambda p, x: (norm(x @ p["w"]) * p["scale"] + p["shift"]) @ p["u"]


def _rms(x: Any) -> Any:
    return x * lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-5)


def _batch_norm(x: Any) -> Any:
    return (x - x.mean(0)) * lax.rsqrt(x.var(0) + 1e-5)


def _group_norm(x: Any) -> Any:
    return _norm(x.reshape(x.shape[0], 4, -1)).reshape(x.shape)


def _patches(p: Any, x: Any) -> Any:
    """Patch embedding of a vision transformer, with learnt positions and a class token."""
    patches = lax.conv_general_dilated(x, p["w"], (4, 4), "VALID", dimension_numbers=DIMENSIONS)
    tokens = patches.reshape(x.shape[0], 4, -1) + p["positions"]
    first = jnp.broadcast_to(p["token"], (x.shape[0], 1, tokens.shape[-1]))
    return jnp.concatenate([first, tokens], axis=1) @ p["u"]


def _mixer(p: Any, x: Any) -> Any:
    """Mixing over tokens, then over channels."""
    x = x + jnp.swapaxes(jax.nn.gelu(jnp.swapaxes(_norm(x), 1, 2) @ p["a"]) @ p["b"], 1, 2)
    return x + jax.nn.gelu(_norm(x) @ p["c"]) @ p["d"]


def _conv(x: Any, w: Any, stride: int = 1) -> Any:
    return jax.nn.relu(lax.conv_general_dilated(x, w, (stride, stride), "SAME", dimension_numbers=DIMENSIONS))


def _unet(p: Any, x: Any) -> Any:
    """One level down and up, with a skip connection."""
    skip = _conv(x, p["a"])
    down = _conv(skip, p["b"], 2)
    up = lax.conv_transpose(down, p["c"], (2, 2), "SAME")
    return _conv(jnp.concatenate([skip, up], -1), p["d"])


def _experts_by_einsum(p: Any, x: Any) -> Any:
    """Every expert for every token, weighted by the router."""
    weights = jax.nn.softmax(x @ p["router"])
    hidden = jax.nn.relu(jnp.einsum("bi,eij->bej", x, p["up"]))
    return jnp.einsum("bej,ejk,be->bk", hidden, p["down"], weights)


def _experts_by_dispatch(p: Any, x: Any) -> Any:
    """Capacity slots filled by one-hot products, as in GShard."""
    choice = jax.nn.one_hot(jnp.argmax(x @ p["router"], -1), 4)
    place = jax.nn.one_hot((jnp.cumsum(choice, 0) * choice).sum(-1) - 1, x.shape[0])
    dispatch = choice[:, :, None] * place[:, None, :]
    slots = jnp.einsum("bes,bi->esi", dispatch, x)
    outputs = jnp.einsum("esj,ejk->esk", jax.nn.relu(jnp.einsum("esi,eij->esj", slots, p["up"])), p["down"])
    return jnp.einsum("bes,esk->bk", dispatch, outputs)


def _experts_by_gather(p: Any, x: Any) -> Any:
    """Weights of the best two experts are looked up for every token."""
    weights, chosen = lax.top_k(jax.nn.softmax(x @ p["router"]), 2)
    hidden = jax.nn.relu(jnp.einsum("bi,bkij->bkj", x, p["up"][chosen]))
    return jnp.einsum("bkj,bkjo,bk->bo", hidden, p["down"][chosen], weights)


def _experts_by_ragged_dot(p: Any, x: Any) -> Any:
    """Tokens sorted by expert, one ragged product per layer."""
    expert = jnp.argmax(x @ p["router"], -1)
    order, sizes = jnp.argsort(expert), jnp.bincount(expert, length=4)
    hidden = jax.nn.relu(lax.ragged_dot(x[order], p["up"], sizes))
    return lax.ragged_dot(hidden, p["down"], sizes)[jnp.argsort(order)]


def _experts_by_constant_ragged_dot(p: Any, x: Any) -> Any:
    """Groups of one size for all members."""
    return lax.ragged_dot(x, p["up"], jnp.array([x.shape[0] - 3, 1, 1, 1]))


def _experts_by_switch(p: Any, x: Any) -> Any:
    branches = [lambda x, e=e: jax.nn.relu(x @ p["up"][e]) @ p["down"][e] for e in range(4)]
    return jax.vmap(lambda x: lax.switch(jnp.argmax(x @ p["router"]), branches, x))(x)


def _graph(p: Any, batch: Any) -> Any:
    """Messages along edges, summed at their receivers."""
    nodes, senders, receivers = batch
    messages = jax.nn.relu(nodes[senders] @ p["w"])
    return jax.ops.segment_sum(messages, receivers, nodes.shape[0]) @ p["u"]


def _graph_attention(p: Any, batch: Any) -> Any:
    nodes, senders, receivers = batch
    hidden = nodes @ p["w"]
    scores = jnp.exp(jnp.tanh(hidden[senders] @ p["a"] + hidden[receivers] @ p["b"]))
    total = jax.ops.segment_sum(scores, receivers, nodes.shape[0])
    return jax.ops.segment_sum(scores[:, None] * hidden[senders], receivers, nodes.shape[0]) / (total[:, None] + 1e-3)


def _equilibrium(p: Any, x: Any) -> Any:
    """A fixed point, found by iteration."""
    body = lambda state: (state[0] + 1, jnp.tanh(0.3 * state[1] @ p["w"] + x @ p["u"]))  # noqa: E731
    return lax.while_loop(lambda state: state[0] < 30, body, (0, jnp.zeros_like(x)))[1]


def _coupling(p: Any, x: Any) -> Any:
    """An affine coupling of a normalising flow, with its log determinant."""
    a, b = jnp.split(x, 2, axis=-1)
    scale, shift = jnp.split(jnp.tanh(a @ p["w"]) @ p["u"], 2, axis=-1)
    return jnp.concatenate([a, b * jnp.exp(scale) + shift], -1), scale.sum(-1)


def _vae(p: Any, x: Any) -> Any:
    mean, log_std = jnp.split(jnp.tanh(x @ p["enc"]) @ p["latent"], 2, axis=-1)
    z = mean + jnp.exp(log_std) * jax.random.normal(jax.random.key(0), mean.shape)
    return jnp.mean((jnp.tanh(z @ p["dec"]) - x) ** 2) + jnp.mean(mean**2 + jnp.exp(2 * log_std) - 2 * log_std)


def _ranking(p: Any, x: Any) -> Any:
    """Ranks by pairwise comparisons, without a sort."""
    scores = (x @ p["w"]).mean(-1)
    return jax.nn.sigmoid(5.0 * (scores[:, None] - scores)).sum(1)


def _hash_embedding(p: Any, tokens: Any) -> Any:
    """Two hashes of a token share one table."""
    hashes = jnp.stack([tokens * 7 + 3, tokens * 13 + 5], -1) % p["w"].shape[0]
    return p["w"][hashes].sum(-2)


def _capsules(p: Any, x: Any) -> Any:
    """Routing by agreement between capsules."""
    capsules = x.reshape(x.shape[0], 4, -1)
    votes = jnp.einsum("bci,cdij->bcdj", capsules, p["w"])
    logits = jnp.zeros(votes.shape[:-1])
    for _ in range(2):
        out = jnp.tanh(jnp.einsum("bcd,bcdj->bdj", jax.nn.softmax(logits), votes))
        logits = logits + jnp.einsum("bcdj,bdj->bcd", votes, out)
    return out


NORMED = {"w": "n n", "u": "n n", "scale": ONES, "shift": ONES}
GRAPH = ["b n", ids("2b", "b"), ids("2b", "b")]
LAYER = {"w": "n n", "bias": "n"}
USES = (
    use("MLP of three layers", {"a": LAYER, "b": LAYER, "c": LAYER}, _mlp),
    use("SwiGLU", {"gate": "n 2n", "up": "n 2n", "down": "2n n"}, _swiglu),
    use("SwiGLU, fused", {"both": "n 4n", "down": "2n n"}, _fused_swiglu),
    use("layer norm", NORMED, _normed(_norm)),
    use("RMS norm", NORMED, _normed(_rms)),
    use("batch norm", NORMED, _normed(_batch_norm)),
    use("group norm", NORMED, _normed(_group_norm)),
    use(
        "norm scale folded into the weights",
        {"w": "n n", "scale": ONES},
        lambda p, x: _rms(x) @ (p["scale"][:, None] * p["w"]),
    ),
    use("ViT patch embedding", {"w": "4 4 4 n", "positions": "4 n", "token": "n", "u": "n n"}, _patches, IMAGES),
    use("MLP mixer", {"a": "8 16", "b": "16 8", "c": "n n", "d": "n n"}, _mixer, "b 8 n"),
    use("U-Net block", {"a": "3 3 4 n/2", "b": "3 3 n/2 n/2", "c": "2 2 n/2 n/2", "d": "3 3 n 4"}, _unet, IMAGES),
    use("mixture of experts by einsum", EXPERTS, _experts_by_einsum),
    use("mixture of experts by dispatch", EXPERTS, _experts_by_dispatch),
    use("mixture of experts by gather of the top two", EXPERTS, _experts_by_gather),
    use("mixture of experts by ragged_dot", EXPERTS, _experts_by_ragged_dot),
    use("ragged_dot with constant groups", {"up": "4 n n"}, _experts_by_constant_ragged_dot),
    use("mixture of experts by switch", EXPERTS, _experts_by_switch, expected="built"),
    use("graph layer by segment_sum", {"w": "n n", "u": "n n"}, _graph, GRAPH),
    use("graph attention", {"w": "n n", "a": "n", "b": "n"}, _graph_attention, GRAPH),
    use("deep equilibrium by while_loop", {"w": "n n", "u": "n n"}, _equilibrium),
    use("coupling of a normalising flow", {"w": "n/2 n", "u": "n n"}, _coupling),
    use("variational autoencoder", {"enc": "n n", "latent": "n n", "dec": "n/2 n"}, _vae),
    use("differentiable ranking", {"w": "n n"}, _ranking),
    use("hash embedding", {"w": "n n"}, _hash_embedding, ids("b", "2n")),
    use("capsules", {"w": "4 3 n/4 n/2"}, _capsules),
)
