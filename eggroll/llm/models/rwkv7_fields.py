"""Tensors and config.json of RWKV-7, with the names of the original files or of flash-linear-attention.

    original      blocks.0.att.receptance.weight      vectors stored [1, 1, D]; W1 [D, rank]
    the latter    model.layers.0.attn.r_proj.weight   mixes of the time mix stored [1, 1, D]; W1 as a linear layer, [rank, D]

The first layer of either may lack b0, V1 and V2, which have no effect there: ours are zeros and are not saved.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from eggroll.llm.models.fields import check_supported, integer, number, shorten
from eggroll.llm.models.leaves import Leaf, Leaves
from eggroll.llm.models.rwkv7 import RWKV7Config

FIXED = {"hidden_act": "sqrelu", "norm_first": True, "norm_bias": True, "tie_word_embeddings": False, "attn": None}
_ADAPTERS = {"w": "decay_low_rank_dim", "a": "a_low_rank_dim", "v": "v_low_rank_dim", "g": "gate_low_rank_dim"}
_GROWTH = {"w": 2.5, "a": 2.5, "v": 1.7, "g": 5.0}  # default inner size over the root of the width
_PROJECTIONS = {"r": ("receptance", "r_proj"), "k": ("key", "k_proj"), "v": ("value", "v_proj"), "o": ("output", "o_proj")}
_NORMS = {"mix_norm": ("ln1", "attn_norm"), "ffn_norm": ("ln2", "ffn_norm"), "y_norm": ("att.ln_x", "attn.g_norm")}


def from_fields(fields: Mapping[str, Any]) -> RWKV7Config:
    """Read config.json.

    Raises:
        ValueError: a missing field, or a variant that is not supported.
    """
    for name, value in FIXED.items():
        check_supported(fields, name, value)
    width = integer(fields, "hidden_size")
    widths = fields.get("value_dim") or [width]
    if any(value != width for value in (widths if isinstance(widths, list) else [widths])):
        raise ValueError(f"'value_dim' in config.json must be hidden_size {width} in every layer, got {shorten(widths)}.")
    by_heads = width // integer(fields, "num_heads") if fields.get("num_heads") is not None else 64
    head_dim = integer(fields, "head_dim", integer(fields, "head_size", by_heads))

    def inner(name: str) -> int:
        wider = 1 if name == "g" else head_dim / 64
        return integer(fields, _ADAPTERS[name], max(32, 32 * round(_GROWTH[name] * width**0.5 * wider / 32)))

    return RWKV7Config(
        vocab_size=integer(fields, "vocab_size"),
        hidden_size=width,
        intermediate_size=integer(fields, "intermediate_size", 32 * -(-int(width * number(fields, "hidden_ratio", 4)) // 32)),
        num_hidden_layers=integer(fields, "num_hidden_layers"),
        decay_low_rank_dim=inner("w"),
        a_low_rank_dim=inner("a"),
        v_low_rank_dim=inner("v"),
        gate_low_rank_dim=inner("g"),
        head_dim=head_dim,
        norm_eps=number(fields, "norm_eps", 1e-5),
    )


def to_fields(config: RWKV7Config) -> dict[str, Any]:
    """Return config.json."""
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name != "original_names"}
    return {"model_type": "rwkv7", "architectures": ["RWKV7ForCausalLM"], **fields, **FIXED}


def detect_names(config: RWKV7Config, tensors: Iterable[str]) -> RWKV7Config:
    """Return the configuration with the naming scheme of a file's tensors."""
    return dataclasses.replace(config, original_names="emb.weight" in tensors)


def leaves(config: RWKV7Config) -> Leaves:
    """Return the table of parameters."""
    original, width = config.original_names, config.hidden_size
    prefix = "blocks.{layer}" if original else "model.layers.{layer}"
    mixer, vocabulary = f"{prefix}.{'att' if original else 'attn'}", (config.vocab_size, width)
    first = "blocks.0.ln0" if original else "model.layers.0.pre_norm"
    resident = {
        "embed": Leaf("emb.weight" if original else "model.embeddings.weight", vocabulary, start="embedding"),
        "head": Leaf("head.weight" if original else "lm_head.weight", vocabulary, start="embedding"),
        **_norm("embed_norm", first, width),
        **_norm("final_norm", "ln_out" if original else "model.norm", width),
    }
    blocks: dict[str, Leaf] = {}
    for name, tensors in _NORMS.items():
        blocks |= _norm(name, f"{prefix}.{tensors[not original]}", width)
    for name in "rwkvag":
        blocks[f"mix_{name}"] = Leaf(f"{mixer}.x_{name}", (width,), start="half", stored=(1, 1, width))
    for name, tensors in _PROJECTIONS.items():
        blocks[name] = Leaf(f"{mixer}.{tensors[not original]}.weight", (width, width), transposed=True)
    for name, rank in _ADAPTERS.items():
        blocks |= _adapter(name, mixer, width, getattr(config, rank), original=original)
    vector = (1, 1, width) if original else (width,)
    for name, start in (("k_k", "ones"), ("k_a", "ones")):
        blocks[name] = Leaf(f"{mixer}.{name}", (width,), start=start, stored=vector)
    blocks["r_k"] = Leaf(f"{mixer}.r_k", (width,), start="zeros", stored=(width // config.head_dim, config.head_dim))
    blocks["ffn_mix_k"] = Leaf(f"{prefix}.ffn.x_k", (width,), start="half", stored=vector)
    blocks["ffn_k"] = Leaf(f"{prefix}.ffn.key.weight", (width, config.intermediate_size), transposed=True)
    blocks["ffn_v"] = Leaf(f"{prefix}.ffn.value.weight", (config.intermediate_size, width), transposed=True)
    return Leaves(resident, blocks, config.num_hidden_layers)


def _norm(name: str, tensor: str, width: int) -> dict[str, Leaf]:
    return {
        f"{name}_scale": Leaf(f"{tensor}.weight", (width,), start="ones"),
        f"{name}_bias": Leaf(f"{tensor}.bias", (width,), start="zeros"),
    }


def _adapter(name: str, mixer: str, width: int, rank: int, *, original: bool) -> dict[str, Leaf]:
    """Return the matrices of a small two-layer map and, except for the gate, its bias."""
    places = ("0", "1", "2") if original else ("_lora.lora.2.bias", "_lora.lora.0.weight", "_lora.lora.2.weight")
    added, inner, outer = (f"{mixer}.{name}{place}" for place in places)
    start = int(name == "v")  # the first layer has no V1, V2 and b0
    leaves = {
        f"{name}1": Leaf(inner, (width, rank), transposed=not original, first_layer=start),
        f"{name}2": Leaf(outer, (rank, width), transposed=not original, first_layer=start),
    }
    if name != "g":
        stored = (1, 1, width) if original else (width,)
        leaves[f"{name}0"] = Leaf(added, (width,), start="zeros", stored=stored, first_layer=start)
    return leaves
