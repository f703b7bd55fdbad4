"""Qwen3 (arXiv 2505.09388): RMS norms, also of queries and keys, grouped heads, rotary positions, SwiGLU.

Small configurations of it are also the plain transformer of the shipped experiments.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from experiments.models.attention import attend, positions, rms_norm, rotary_tables, rotate, visible
from experiments.models.decoder import Decoder
from experiments.models.fields import integers, only
from experiments.models.leaves import Leaf, Leaves, linear

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
HEAD_DIM, MAX_POSITIONS, THETA = 128, 32768, 10000.0  # of a config.json that leaves them out


@dataclasses.dataclass(frozen=True)
class Qwen3Config:
    """Sizes of a Qwen3 model, named as in config.json.

    Args:
        vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: sizes.
        num_key_value_heads: heads of keys and values, a divisor of num_attention_heads.
        head_dim: size of a head, even.
        max_position_embeddings: longest text it was trained on; not a limit here.
        rms_norm_eps: added to the mean square in the norms.
        rope_theta: base of the rotary frequencies.
        tie_word_embeddings: the head is the embedding.
        attention_bias: q, k, v and o have biases.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = HEAD_DIM
    max_position_embeddings: int = MAX_POSITIONS
    rms_norm_eps: float = 1e-6
    rope_theta: float = THETA
    tie_word_embeddings: bool = False
    attention_bias: bool = False

    model_type: ClassVar[str] = "qwen3"

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is no multiple of num_key_value_heads "
                f"{self.num_key_value_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}: rotary positions turn pairs.")


class Aux(NamedTuple):
    """What every block gets: visible positions bool [B, T, T], rotary tables float32 [B, T, head_dim / 2]."""

    seen: Array
    cos: Array
    sin: Array


def from_fields(fields: Mapping[str, Any]) -> Qwen3Config:
    """Read config.json.

    Raises:
        ValueError: a missing field, or a variant that is not supported.
    """
    only(fields, "hidden_act", "silu")
    only(fields, "use_sliding_window", False)
    if "sliding_attention" in (fields.get("layer_types") or []):
        raise ValueError(
            "'layer_types' in config.json has 'sliding_attention', and of 'qwen3' only full attention is supported."
        )
    defaults: dict[str, Any] = {"head_dim": HEAD_DIM, "max_position_embeddings": MAX_POSITIONS}
    defaults["num_key_value_heads"] = fields.get("num_attention_heads")
    given = {name: value for name, value in fields.items() if value is not None}
    return Qwen3Config(
        **integers(defaults | given, *SIZES, *defaults),
        rms_norm_eps=fields.get("rms_norm_eps", 1e-6),
        rope_theta=_rope_theta(fields),
        tie_word_embeddings=fields.get("tie_word_embeddings", False),
        attention_bias=fields.get("attention_bias", False),
    )


def _rope_theta(fields: Mapping[str, Any]) -> float:
    """The base, from `rope_parameters` or the older `rope_theta` and `rope_scaling`."""
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rotary positions of type '{kind}' in config.json, and of 'qwen3' only 'default' is supported.")
    return float(rope.get("rope_theta", fields.get("rope_theta", THETA)))


def to_fields(config: Qwen3Config) -> dict[str, Any]:
    """Return config.json, readable by transformers before and after 5."""
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    fields = dataclasses.asdict(config) | {"rope_parameters": rope, "hidden_act": "silu", "use_sliding_window": False}
    return {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], **fields}


def leaves(config: Qwen3Config) -> Leaves:
    """Return the table of parameters."""
    width, size, ffn, bias = config.hidden_size, config.head_dim, config.intermediate_size, config.attention_bias
    queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
    layer = "model.layers.{layer}"
    resident = {
        "embed": Leaf("model.embed_tokens.weight", (config.vocab_size, width), start="embedding"),
        "final_norm": Leaf("model.norm.weight", (width,), start="ones"),
    }
    if not config.tie_word_embeddings:
        resident["head"] = Leaf("lm_head.weight", (config.vocab_size, width), start="embedding")
    blocks = {
        "attention_norm": Leaf(f"{layer}.input_layernorm.weight", (width,), start="ones"),
        "ffn_norm": Leaf(f"{layer}.post_attention_layernorm.weight", (width,), start="ones"),
        "q_norm": Leaf(f"{layer}.self_attn.q_norm.weight", (size,), start="ones"),
        "k_norm": Leaf(f"{layer}.self_attn.k_norm.weight", (size,), start="ones"),
    }
    for name, inputs, outputs in (("q", width, queries), ("k", width, keys), ("v", width, keys), ("o", queries, width)):
        blocks |= linear(name, f"{layer}.self_attn.{name}_proj", inputs, outputs, bias=bias)
    for name, inputs, outputs in (("gate", width, ffn), ("up", width, ffn), ("down", ffn, width)):
        blocks |= linear(name, f"{layer}.mlp.{name}_proj", inputs, outputs, bias=False)
    return Leaves(resident, blocks, config.num_hidden_layers)


def decoder(config: Qwen3Config) -> Decoder:
    """Return the model's functions."""
    size, epsilon = config.head_dim, config.rms_norm_eps

    def begin(resident: Any, tokens: Array, mask: Array) -> tuple[Array, Aux]:
        cos, sin = rotary_tables(positions(mask), size, config.rope_theta)
        return jnp.take(resident["embed"], tokens, axis=0), Aux(visible(mask), cos, sin)

    def dense(own: Any, name: str, x: Array) -> Array:
        out = x @ own[name]
        return out + own[f"{name}_bias"] if config.attention_bias else out

    def attention(own: Any, x: Array, aux: Aux) -> Array:
        q, k, v = (dense(own, name, x).reshape(*x.shape[:2], -1, size) for name in ("q", "k", "v"))
        q = rotate(rms_norm(q, own["q_norm"], epsilon), aux.cos, aux.sin)
        k = rotate(rms_norm(k, own["k_norm"], epsilon), aux.cos, aux.sin)
        return dense(own, "o", attend(q, k, v, aux.seen))

    def block(own: Any, x: Array, aux: Aux) -> Array:
        x = x + attention(own, rms_norm(x, own["attention_norm"], epsilon), aux)
        normed = rms_norm(x, own["ffn_norm"], epsilon)
        return x + (jax.nn.silu(normed @ own["gate"]) * (normed @ own["up"])) @ own["down"]

    def logits(resident: Any, x: Array) -> Array:
        head = resident["embed"] if config.tie_word_embeddings else resident["head"]
        x = rms_norm(x, resident["final_norm"], epsilon)
        return jnp.einsum("btd,vd->btv", x, head, preferred_element_type=jnp.float32)

    return Decoder(begin, block, logits)
