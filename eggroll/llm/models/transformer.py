"""One decoder for Llama 2 and 3, Qwen2, Qwen2.5 and Qwen3: RMS norms, grouped heads, rotary positions, SwiGLU.

    x = x + attention(norm(x))                        Qwen3 (arXiv 2505.09388) also norms queries and keys; Qwen2 has biases on
    x = x + (silu(h Wg) * (h Wu)) Wd, h = norm(x)     q, k and v; Llama may have biases everywhere

Small configurations of it are also the plain transformer of the shipped experiments. `transformer_fields` reads and writes
config.json, `transformer_cache` continues texts.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from eggroll.llm.decoder import Decoder
from eggroll.llm.int8 import matmul
from eggroll.llm.models import rotary
from eggroll.llm.models.attention import attend, positions, rms_norm, visible
from eggroll.llm.models.leaves import Leaf, Leaves, linear
from eggroll.llm.models.rotary import Rotary, rotate

PLAIN = Rotary()
MODEL_TYPES = ("llama", "qwen2", "qwen3")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a model, named as in config.json.

    Args:
        vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: sizes.
        num_key_value_heads: heads of keys and values, a divisor of num_attention_heads.
        head_dim: size of a head, even.
        model_type: "llama", "qwen2" (biases on q, k, v) or "qwen3" (norms of queries and keys).
        max_position_embeddings: longest text it was trained on; not a limit here.
        rms_norm_eps: added to the mean square in the norms.
        rotary: how positions turn queries and keys.
        tie_word_embeddings: the head is the embedding.
        attention_bias: q, k, v and o have biases; not of qwen2.
        mlp_bias: gate, up and down have biases; of llama only.

    Raises:
        ValueError: sizes that do not divide, or biases that the model_type does not have.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    _: dataclasses.KW_ONLY
    model_type: str = "qwen3"
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rotary: Rotary = PLAIN
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self):
        if self.model_type not in MODEL_TYPES:
            raise ValueError(f"model_type must be one of {', '.join(MODEL_TYPES)}, got {self.model_type!r}.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is no multiple of num_key_value_heads "
                f"{self.num_key_value_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}: rotary positions turn pairs.")
        for name, models in (("attention_bias", ("llama", "qwen3")), ("mlp_bias", ("llama",))):
            if getattr(self, name) and self.model_type not in models:
                raise ValueError(f"{name} must be False of model_type '{self.model_type}', got {getattr(self, name)!r}.")


class Aux(NamedTuple):
    """What every block gets: visible positions bool [B, T, T], rotary tables float32 [B, T, head_dim / 2]."""

    seen: Array
    cos: Array
    sin: Array


def leaves(config: TransformerConfig) -> Leaves:
    """Return the table of parameters."""
    width, size, ffn = config.hidden_size, config.head_dim, config.intermediate_size
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
    }
    if config.model_type == "qwen3":
        for name in ("q_norm", "k_norm"):
            blocks[name] = Leaf(f"{layer}.self_attn.{name}.weight", (size,), start="ones")
    for name, inputs, outputs in (("q", width, queries), ("k", width, keys), ("v", width, keys), ("o", queries, width)):
        bias = config.attention_bias or (config.model_type == "qwen2" and name != "o")
        blocks |= linear(name, f"{layer}.self_attn.{name}_proj", inputs, outputs, bias=bias)
    for name, inputs, outputs in (("gate", width, ffn), ("up", width, ffn), ("down", ffn, width)):
        blocks |= linear(name, f"{layer}.mlp.{name}_proj", inputs, outputs, bias=config.mlp_bias)
    return Leaves(resident, blocks, config.num_hidden_layers)


def dense(own: Any, name: str, x: Array) -> Array:
    """Return x W, plus the bias where there is one."""
    out = matmul(x, own[name])
    return out + own[f"{name}_bias"] if f"{name}_bias" in own else out


def embed(resident: Any, tokens: Array) -> Array:
    """Look up words, [B, T, D] from int32 [B, T]."""
    return jnp.take(resident["embed"], tokens, axis=0)


def heads(config: TransformerConfig, own: Any, x: Array, cos: Array, sin: Array) -> tuple[Array, Array, Array]:
    """Return queries [B, T, H, d], keys and values [B, T, K, d] of one block, rotated; x [B, T, D]."""
    x = rms_norm(x, own["attention_norm"], config.rms_norm_eps)
    q, k, v = (dense(own, name, x).reshape(*x.shape[:2], -1, config.head_dim) for name in ("q", "k", "v"))
    if "q_norm" in own:
        q, k = rms_norm(q, own["q_norm"], config.rms_norm_eps), rms_norm(k, own["k_norm"], config.rms_norm_eps)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def rest(config: TransformerConfig, own: Any, x: Array, attended: Array) -> Array:
    """Return what the block gives, from what it got [B, T, D] and what its heads saw [B, T, H d]."""
    x = x + dense(own, "o", attended)
    normed = rms_norm(x, own["ffn_norm"], config.rms_norm_eps)
    return x + dense(own, "down", jax.nn.silu(dense(own, "gate", normed)) * dense(own, "up", normed))


def logits(config: TransformerConfig, resident: Any, x: Array) -> Array:
    """Return the final norm and the head, float32 [B, T, V]."""
    head = resident["embed"] if config.tie_word_embeddings else resident["head"]
    x = rms_norm(x, resident["final_norm"], config.rms_norm_eps)
    return jnp.einsum("btd,vd->btv", x, head, preferred_element_type=jnp.float32)


def decoder(config: TransformerConfig) -> Decoder:
    """Return the model's functions."""

    def begin(resident: Any, tokens: Array, mask: Array) -> tuple[Array, Aux]:
        return embed(resident, tokens), Aux(visible(mask), *rotary.tables(config.rotary, positions(mask), config.head_dim))

    def block(own: Any, x: Array, aux: Aux) -> Array:
        return rest(config, own, x, attend(*heads(config, own, x, aux.cos, aux.sin), aux.seen))

    return Decoder(begin, block, lambda resident, x: logits(config, resident, x))
