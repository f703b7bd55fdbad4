"""config.json of the transformer family, read and written as transformers does."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from eggroll.llm.models import rotary
from eggroll.llm.models.fields import integers, only, required
from eggroll.llm.models.transformer import TransformerConfig

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
QWEN3_HEAD, LLAMA_POSITIONS, QWEN_POSITIONS = 128, 2048, 32768  # of a config.json that leaves them out


def from_fields(fields: Mapping[str, Any]) -> TransformerConfig:
    """Read config.json.

    Raises:
        ValueError: a missing field, or a variant that is not supported.
    """
    model = fields["model_type"]
    for name, expected in (("hidden_act", "silu"), ("use_sliding_window", False)):
        only(fields, name, expected)
    other = set(fields.get("layer_types") or []) - {"full_attention"}
    if other:
        raise ValueError(f"'layer_types' in config.json has '{min(other)}', and of '{model}' only full attention is supported.")
    return TransformerConfig(
        **integers(_sizes(fields), *SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings"),
        model_type=model,
        rms_norm_eps=fields.get("rms_norm_eps", 1e-6),
        rotary=rotary.from_fields(fields),
        tie_word_embeddings=fields.get("tie_word_embeddings", False),
        attention_bias=model != "qwen2" and fields.get("attention_bias", False),
        mlp_bias=model == "llama" and fields.get("mlp_bias", False),
    )


def _sizes(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields, with sizes that may be left out."""
    given = {name: value for name, value in fields.items() if value is not None}
    llama = fields["model_type"] == "llama"
    given.setdefault("max_position_embeddings", LLAMA_POSITIONS if llama else QWEN_POSITIONS)
    given.setdefault("num_key_value_heads", required(fields, "num_attention_heads"))
    if "head_dim" not in given and fields["model_type"] == "qwen3":
        given["head_dim"] = QWEN3_HEAD
    elif "head_dim" not in given:
        width, heads = integers(given, "hidden_size", "num_attention_heads").values()
        if width % heads:
            raise ValueError(f"hidden_size {width} in config.json is no multiple of num_attention_heads {heads}.")
        given["head_dim"] = width // heads
    return given


def to_fields(config: TransformerConfig) -> dict[str, Any]:
    """Return config.json."""
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name != "rotary"}
    fields |= {"architectures": [ARCHITECTURES[config.model_type]], "hidden_act": "silu", **rotary.to_fields(config.rotary)}
    return fields if config.model_type == "llama" else fields | {"use_sliding_window": False}
