"""OPT (Zhang et al., arXiv 2205.01068): learned positions, layer norms, relu, biases; also the post-norm form of 350m."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from eggroll.llm.decoder import Decoder
from eggroll.llm.models.attention import attend, causal_mask, layer_norm, positions
from eggroll.llm.models.fields import check_supported, flag, integer
from eggroll.llm.models.leaves import Leaf, Leaves, linear_leaves

OFFSET = 2  # the first two rows of the position table belong to padding
EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class OPTConfig:
    """Sizes of an OPT model, named as in config.json.

    Args:
        vocab_size, hidden_size, num_hidden_layers, ffn_dim, num_attention_heads, max_position_embeddings: sizes.
        word_embed_proj_dim: width of the embedding; hidden_size unless it is projected.
        do_layer_norm_before: norms before attention and feed-forward, and a final norm; False: norms after each, no final norm.
        tie_word_embeddings: the head is the embedding.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    ffn_dim: int
    num_attention_heads: int
    max_position_embeddings: int
    word_embed_proj_dim: int
    do_layer_norm_before: bool = True
    tie_word_embeddings: bool = True

    model_type: ClassVar[str] = "opt"

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}."
            )


def from_fields(fields: Mapping[str, Any]) -> OPTConfig:
    """Read config.json.

    Raises:
        ValueError: a missing field, or a variant that is not supported.
    """
    for name, expected in (("activation_function", "relu"), ("enable_bias", True), ("layer_norm_elementwise_affine", True)):
        check_supported(fields, name, expected)
    check_supported(fields, "_remove_final_layer_norm", False)
    return OPTConfig(
        vocab_size=integer(fields, "vocab_size"),
        hidden_size=integer(fields, "hidden_size"),
        num_hidden_layers=integer(fields, "num_hidden_layers"),
        ffn_dim=integer(fields, "ffn_dim"),
        num_attention_heads=integer(fields, "num_attention_heads"),
        max_position_embeddings=integer(fields, "max_position_embeddings"),
        word_embed_proj_dim=integer(fields, "word_embed_proj_dim", integer(fields, "hidden_size")),
        do_layer_norm_before=flag(fields, "do_layer_norm_before", True),
        tie_word_embeddings=flag(fields, "tie_word_embeddings", True),
    )


def to_fields(config: OPTConfig) -> dict[str, Any]:
    """Return config.json."""
    return {"model_type": "opt", "architectures": ["OPTForCausalLM"], **dataclasses.asdict(config)}


def leaves(config: OPTConfig) -> Leaves:
    """Return the table of parameters."""
    width, words, ffn = config.hidden_size, config.word_embed_proj_dim, config.ffn_dim
    layer = "model.decoder.layers.{layer}"
    resident = {
        "embed": Leaf("model.decoder.embed_tokens.weight", (config.vocab_size, words), start="embedding"),
        "positions": Leaf(
            "model.decoder.embed_positions.weight", (config.max_position_embeddings + OFFSET, width), start="embedding"
        ),
    }
    if words != width:
        resident |= linear_leaves("project_in", "model.decoder.project_in", words, width, bias=False)
        resident |= linear_leaves("project_out", "model.decoder.project_out", width, words, bias=False)
    if config.do_layer_norm_before:
        resident |= _norm("final_norm", "model.decoder.final_layer_norm", width)
    if not config.tie_word_embeddings:
        resident["head"] = Leaf("lm_head.weight", (config.vocab_size, words), start="embedding")
    blocks = _norm("attention_norm", f"{layer}.self_attn_layer_norm", width) | _norm(
        "ffn_norm", f"{layer}.final_layer_norm", width
    )
    for name, tensor in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("o", "out_proj")):
        blocks |= linear_leaves(name, f"{layer}.self_attn.{tensor}", width, width, bias=True)
    blocks |= linear_leaves("up", f"{layer}.fc1", width, ffn, bias=True) | linear_leaves(
        "down", f"{layer}.fc2", ffn, width, bias=True
    )
    return Leaves(resident, blocks, config.num_hidden_layers)


def _norm(name: str, tensor: str, width: int) -> dict[str, Leaf]:
    return {
        f"{name}_scale": Leaf(f"{tensor}.weight", (width,), start="ones"),
        f"{name}_bias": Leaf(f"{tensor}.bias", (width,), start="zeros"),
    }


def make_decoder(config: OPTConfig) -> Decoder:
    """Return the model's functions."""
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads

    def begin(resident: Any, tokens: Array, mask: Array) -> tuple[Array, Any]:
        if tokens.shape[1] > config.max_position_embeddings:
            raise ValueError(
                f"{tokens.shape[1]} tokens do not fit the {config.max_position_embeddings} positions of this model."
            )
        x = jnp.take(resident["embed"], tokens, axis=0)
        x = x @ resident["project_in"] if "project_in" in resident else x
        return x + jnp.take(resident["positions"], positions(mask) + OFFSET, axis=0), causal_mask(mask)

    def norm(params: Any, name: str, x: Array) -> Array:
        return layer_norm(x, params[f"{name}_scale"], params[f"{name}_bias"], EPSILON)

    def dense(params: Any, name: str, x: Array) -> Array:
        return x @ params[name] + params[f"{name}_bias"]

    def attention(weights: Any, x: Array, seen: Array) -> Array:
        q, k, v = (dense(weights, name, x).reshape(*x.shape[:2], heads, size) for name in ("q", "k", "v"))
        return dense(weights, "o", attend(q, k, v, seen))

    def feed_forward(weights: Any, x: Array) -> Array:
        return dense(weights, "down", jax.nn.relu(dense(weights, "up", x)))

    def block(weights: Any, x: Array, seen: Array) -> Array:
        if config.do_layer_norm_before:
            x = x + attention(weights, norm(weights, "attention_norm", x), seen)
            return x + feed_forward(weights, norm(weights, "ffn_norm", x))
        x = norm(weights, "attention_norm", x + attention(weights, x, seen))
        return norm(weights, "ffn_norm", x + feed_forward(weights, x))

    def logits(resident: Any, x: Array) -> Array:
        x = norm(resident, "final_norm", x) if config.do_layer_norm_before else x
        x = x @ resident["project_out"] if "project_out" in resident else x
        head = resident["embed"] if config.tie_word_embeddings else resident["head"]
        return jnp.einsum("btd,vd->btv", x, head, preferred_element_type=jnp.float32)

    return Decoder(begin, block, logits)
