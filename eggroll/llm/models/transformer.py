"""One decoder for Llama 2 and 3, Qwen2, Qwen2.5 and Qwen3: RMS norms, grouped heads, rotary positions, SwiGLU.

    x = x + attention(norm(x))                        Qwen3 (arXiv 2505.09388) also norms queries and keys; Qwen2 has biases on
    x = x + (silu(h Wg) * (h Wu)) Wd, h = norm(x)     q, k and v; Llama may have biases everywhere

Owns the sizes and their config.json (as transformers writes it), the table of parameters, the functions of whole texts, and the
key-value cache that continues them. Small configurations are the plain transformer of the shipped experiments.

The filled length of a cache is one number for all texts, so that the keys of a new token are written in place, also under
`vmap` over members. The cache is a carry of the scan over layers, not a result of it, which would be a copy for every token.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from eggroll.llm.decoder import Decoder
from eggroll.llm.generator import Generator
from eggroll.llm.int8 import matmul
from eggroll.llm.models import rotary
from eggroll.llm.models.attention import attend, attend_by_head, causal_mask, positions, rms_norm
from eggroll.llm.models.fields import check_supported, flag, integer, number, shorten
from eggroll.llm.models.leaves import Leaf, Leaves, linear_leaves
from eggroll.llm.models.rotary import Rotary, rotate

PLAIN = Rotary()
MODEL_TYPES = ("llama", "qwen2", "qwen3")
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
QWEN3_HEAD, LLAMA_POSITIONS, QWEN_POSITIONS = 128, 2048, 32768  # of a config.json that leaves them out


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
        rotary: variant of the rotary positions.
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
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}: rotary positions rotate pairs.")
        for name, models in (("attention_bias", ("llama", "qwen3")), ("mlp_bias", ("llama",))):
            if getattr(self, name) and self.model_type not in models:
                raise ValueError(f"{name} must be False of model_type '{self.model_type}', got {getattr(self, name)!r}.")


def from_fields(fields: Mapping[str, Any]) -> TransformerConfig:
    """Read config.json.

    Raises:
        ValueError: a missing field, or a variant that is not supported.
    """
    model = fields["model_type"]
    for name, expected in (("hidden_act", "silu"), ("use_sliding_window", False)):
        check_supported(fields, name, expected)
    kinds = fields.get("layer_types") or []
    other = [kind for kind in (kinds if isinstance(kinds, list) else [kinds]) if kind != "full_attention"]
    if other:
        named = f"'{other[0]}'" if isinstance(other[0], str) else shorten(other[0])
        raise ValueError(f"'layer_types' in config.json has {named}, but '{model}' supports only full attention.")
    width, heads = integer(fields, "hidden_size"), integer(fields, "num_attention_heads")
    return TransformerConfig(
        vocab_size=integer(fields, "vocab_size"),
        hidden_size=width,
        intermediate_size=integer(fields, "intermediate_size"),
        num_hidden_layers=integer(fields, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=integer(fields, "num_key_value_heads", heads),
        head_dim=_head_dim(fields, width, heads),
        model_type=model,
        max_position_embeddings=integer(
            fields, "max_position_embeddings", LLAMA_POSITIONS if model == "llama" else QWEN_POSITIONS
        ),
        rms_norm_eps=number(fields, "rms_norm_eps", 1e-6),
        rotary=rotary.from_fields(fields),
        tie_word_embeddings=flag(fields, "tie_word_embeddings", False),
        attention_bias=model != "qwen2" and flag(fields, "attention_bias", False),
        mlp_bias=model == "llama" and flag(fields, "mlp_bias", False),
    )


def _head_dim(fields: Mapping[str, Any], width: int, heads: int) -> int:
    """The size of a head; config.json may leave it out."""
    if fields["model_type"] == "qwen3":
        return integer(fields, "head_dim", QWEN3_HEAD)
    if fields.get("head_dim") is None and width % heads:
        raise ValueError(f"hidden_size {width} in config.json is not a multiple of num_attention_heads {heads}.")
    return integer(fields, "head_dim", width // heads)


def to_fields(config: TransformerConfig) -> dict[str, Any]:
    """Return config.json."""
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name != "rotary"}
    fields |= {"architectures": [ARCHITECTURES[config.model_type]], "hidden_act": "silu", **rotary.to_fields(config.rotary)}
    return fields if config.model_type == "llama" else fields | {"use_sliding_window": False}


class Aux(NamedTuple):
    """Inputs of every block: causal mask bool [B, T, T], rotary tables float32 [B, T, head_dim / 2]."""

    seen: Array
    cos: Array
    sin: Array


class Cache(NamedTuple):
    """Keys and values of S = T + max_new_tokens tokens; those from `filled` on are zeros that no token sees."""

    k: Array  # [L, B, K, S, d], rotated
    v: Array  # [L, B, K, S, d]
    seen: Array  # bool [B, S]
    position: Array  # int32 [B], of each text's next token
    filled: Array  # int32 [], where the next token goes


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
        blocks |= linear_leaves(name, f"{layer}.self_attn.{name}_proj", inputs, outputs, bias=bias)
    for name, inputs, outputs in (("gate", width, ffn), ("up", width, ffn), ("down", ffn, width)):
        blocks |= linear_leaves(name, f"{layer}.mlp.{name}_proj", inputs, outputs, bias=config.mlp_bias)
    return Leaves(resident, blocks, config.num_hidden_layers)


def project(weights: Any, name: str, x: Array) -> Array:
    """Return x W, plus the bias if there is one."""
    out = matmul(x, weights[name])
    return out + weights[f"{name}_bias"] if f"{name}_bias" in weights else out


def embed(resident: Any, tokens: Array) -> Array:
    """Look up embeddings, [B, T, D] from int32 [B, T]."""
    return jnp.take(resident["embed"], tokens, axis=0)


def project_heads(config: TransformerConfig, weights: Any, x: Array, cos: Array, sin: Array) -> tuple[Array, Array, Array]:
    """Return queries [B, T, H, d], keys and values [B, T, K, d] of one block, rotated; x [B, T, D]."""
    x = rms_norm(x, weights["attention_norm"], config.rms_norm_eps)
    q, k, v = (project(weights, name, x).reshape(*x.shape[:2], -1, config.head_dim) for name in ("q", "k", "v"))
    if "q_norm" in weights:
        q, k = rms_norm(q, weights["q_norm"], config.rms_norm_eps), rms_norm(k, weights["k_norm"], config.rms_norm_eps)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def finish_block(config: TransformerConfig, weights: Any, x: Array, attended: Array) -> Array:
    """Return the output of the block from its input x [B, T, D] and the output of its heads [B, T, H d]."""
    x = x + project(weights, "o", attended)
    normed = rms_norm(x, weights["ffn_norm"], config.rms_norm_eps)
    return x + project(weights, "down", jax.nn.silu(project(weights, "gate", normed)) * project(weights, "up", normed))


def logits(config: TransformerConfig, resident: Any, x: Array) -> Array:
    """Return the final norm and the head, float32 [B, T, V]."""
    head = resident["embed"] if config.tie_word_embeddings else resident["head"]
    x = rms_norm(x, resident["final_norm"], config.rms_norm_eps)
    return jnp.einsum("btd,vd->btv", x, head, preferred_element_type=jnp.float32)


def make_decoder(config: TransformerConfig) -> Decoder:
    """Return the model's functions."""

    def begin(resident: Any, tokens: Array, mask: Array) -> tuple[Array, Aux]:
        return embed(resident, tokens), Aux(causal_mask(mask), *rotary.tables(config.rotary, positions(mask), config.head_dim))

    def block(weights: Any, x: Array, aux: Aux) -> Array:
        return finish_block(config, weights, x, attend(*project_heads(config, weights, x, aux.cos, aux.sin), aux.seen))

    return Decoder(begin, block, lambda resident, x: logits(config, resident, x))


def make_generator(config: TransformerConfig) -> Generator:
    """Return prefill and step; see `generator` for their contract. A step after max_new_tokens overwrites the last token."""

    def prefill(params: Any, tokens: Array, mask: Array, max_new_tokens: int) -> tuple[Array, Cache]:
        position, seen = positions(mask), causal_mask(mask)
        cos, sin = rotary.tables(config.rotary, position, config.head_dim)

        def layer(x: Array, weights: Any) -> tuple[Array, tuple[Array, Array]]:
            q, k, v = project_heads(config, weights, x, cos, sin)
            return finish_block(config, weights, x, attend(q, k, v, seen)), (
                _by_head(k, max_new_tokens),
                _by_head(v, max_new_tokens),
            )

        x, (k, v) = jax.lax.scan(layer, embed(params["resident"], tokens), params["blocks"])
        cache = Cache(k, v, jnp.pad(mask, [(0, 0), (0, max_new_tokens)]), position[:, -1] + 1, jnp.int32(tokens.shape[1]))
        return logits(config, params["resident"], x[:, -1:])[:, 0], cache

    def step(params: Any, cache: Cache, token: Array) -> tuple[Array, Cache]:
        at = cache.filled
        cos, sin = rotary.tables(config.rotary, cache.position[:, None], config.head_dim)
        seen = jax.lax.dynamic_update_slice(cache.seen, jnp.ones((token.shape[0], 1), bool), (0, at))

        def layer(carry: tuple[Array, Array, Array], xs: tuple[Any, Array]) -> tuple[tuple[Array, Array, Array], None]:
            (x, k, v), (weights, number) = carry, xs
            q, new_k, new_v = project_heads(config, weights, x, cos, sin)
            place = (number, 0, 0, at, 0)
            k, v = (jax.lax.dynamic_update_slice(a, n.swapaxes(1, 2)[None], place) for a, n in ((k, new_k), (v, new_v)))
            own_k, own_v = (jax.lax.dynamic_index_in_dim(a, number, keepdims=False) for a in (k, v))
            return (finish_block(config, weights, x, attend_by_head(q, own_k, own_v, seen[:, None])), k, v), None

        first = embed(params["resident"], token[:, None]), cache.k, cache.v
        numbers = jnp.arange(config.num_hidden_layers, dtype=jnp.int32)
        (x, k, v), _ = jax.lax.scan(layer, first, (params["blocks"], numbers))
        return logits(config, params["resident"], x)[:, 0], Cache(k, v, seen, cache.position + 1, at + 1)

    return Generator(prefill, step)


def _by_head(array: Array, padding: int) -> Array:
    """[B, T, K, d] to [B, K, T + padding, d]."""
    return jnp.pad(array.swapaxes(1, 2), [(0, 0), (0, 0), (0, padding), (0, 0)])
