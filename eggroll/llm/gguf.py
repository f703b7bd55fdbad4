"""Convert a GGUF file, the format of llama.cpp, to a checkpoint folder. Needs the extra `gguf`, not torch.

    tensor = dequantised numbers, float32      q and k of Llama: rows of a head reordered from pairs (x0 y0 x1 y1 ...) to halves

Llama, Qwen2 and Qwen3 whose tokenizer is byte-level BPE. Tensors are converted one at a time while they are written; a kill
leaves the older checkpoint of the folder, the new one, or none that loads (`export`).
"""

import functools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from eggroll.llm.export import replace_checkpoint
from eggroll.llm.gguf_tokenizer import read_tokenizer
from eggroll.llm.models.transformer import MODEL_TYPES, TransformerConfig, from_fields, leaves, to_fields
from eggroll.llm.shards import CONFIG
from eggroll.llm.stacks import Tensor

MAX_SHARD_BYTES = 5_000_000_000
_SIZES = {  # field of the file -> field of config.json
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_OPTIONAL = ("attention.head_count_kv", "attention.key_length", "rope.freq_base")
_NAMES = (  # pattern of a tensor of the checkpoint -> tensor of the file
    (r"model\.embed_tokens\.", "token_embd."),
    (r"model\.norm\.", "output_norm."),
    (r"lm_head\.", "output."),
    (r"model\.layers\.(\d+)\.", r"blk.\1."),
    (r"input_layernorm\.", "attn_norm."),
    (r"post_attention_layernorm\.", "ffn_norm."),
    (r"self_attn\.([qkv])_proj\.", r"attn_\1."),
    (r"self_attn\.([qk])_norm\.", r"attn_\1_norm."),
    (r"self_attn\.o_proj\.", "attn_output."),
    (r"mlp\.(gate|up|down)_proj\.", r"ffn_\1."),
)


def convert(path: str | Path, folder: str | Path) -> Path:
    """Convert a file to a folder that `llm.load` and transformers read: weights in float32, tokenizer, chat template.

    Args:
        path: of a GGUF file, in any quantisation that the package gguf dequantises.
        folder: created if missing; a checkpoint in it is replaced.

    Returns:
        The folder.

    Raises:
        ImportError: the package gguf is not installed.
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or its architecture, rotary positions or tokenizer is not supported.
    """
    file = _File(Path(path))
    config = _read_config(file)
    tensors = _tensors(file, config)
    tokenizer = read_tokenizer(file.values, file.path, vocab_size=config.vocab_size)
    objects = {
        CONFIG: to_fields(config) | tokenizer.ids | {"dtype": "float32"},
        "generation_config.json": tokenizer.ids,
        "tokenizer.json": tokenizer.fields,
        "tokenizer_config.json": tokenizer.settings | {"model_max_length": config.max_position_embeddings},
    }
    files = {name: _json(fields) for name, fields in objects.items()}
    if tokenizer.chat_template is not None:
        files["chat_template.jinja"] = tokenizer.chat_template.encode()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    replace_checkpoint(folder, tensors, files, max_shard_bytes=MAX_SHARD_BYTES)
    return folder


def import_reader() -> Any:
    """Return the package gguf; ImportError with the command that installs it."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError(f"a GGUF file needs the package gguf, of the extra gguf: pip install gguf ({error}).") from None
    return gguf


class _File:
    """An open file.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path):
        gguf = import_reader()
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}.")
        self.path = path
        try:
            reader = gguf.GGUFReader(path)
            self.values = {name: field.contents() for name, field in reader.fields.items()}
        except Exception as error:  # whatever a damaged file makes of the reader
            raise ValueError(f"{path} is not a complete GGUF file: {str(error).rstrip('.')}.") from None
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._dequantize = gguf.dequantize

    def numbers(self, name: str) -> np.ndarray:
        """Return the dequantised numbers of a tensor: float32, its slowest axis first.

        Raises:
            ValueError: its quantisation is not supported, or a number is not finite.
        """
        tensor = self.tensors[name]
        try:
            numbers = self._dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        except NotImplementedError as error:
            raise ValueError(f"tensor '{name}' of {self.path} cannot be dequantised: {error}.") from None
        if not np.isfinite(numbers).all():
            raise ValueError(f"tensor '{name}' of {self.path} has numbers that are not finite: the file is damaged.")
        return numbers


def _read_config(file: _File) -> TransformerConfig:
    values, path = file.values, file.path
    model = values.get("general.architecture")
    if model not in MODEL_TYPES:
        raise ValueError(f"the architecture of {path} must be one of {', '.join(MODEL_TYPES)}, got {model!r}.")
    if _is_scaled(values, f"{model}.rope") or "rope_freqs.weight" in file.tensors:
        raise ValueError(f"the rotary positions of {path} are scaled, which is not converted; convert it with transformers.")
    fields: dict[str, Any] = {"model_type": model}
    for name, field in _SIZES.items():
        if f"{model}.{name}" in values:
            fields[field] = values[f"{model}.{name}"]
        elif name not in _OPTIONAL:
            raise ValueError(f"{path} has no field '{model}.{name}'.")
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{path} has no tensor 'token_embd.weight'.")
    config = from_fields(
        fields
        | {
            "vocab_size": int(file.tensors["token_embd.weight"].shape[-1]),
            "tie_word_embeddings": "output.weight" not in file.tensors,
            "attention_bias": "blk.0.attn_output.bias" in file.tensors,
            "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        }
    )
    rotated = values.get(f"{model}.rope.dimension_count", config.head_dim)
    if rotated != config.head_dim:
        raise ValueError(f"the rotary positions of {path} must rotate all {config.head_dim} numbers of a head, got {rotated}.")
    return config


def _is_scaled(values: Mapping[str, Any], rope: str) -> bool:
    """Whether positions are scaled: a factor without a type is that of linear scaling, which llama.cpp then applies."""
    factor = values.get(f"{rope}.scaling.factor", values.get(f"{rope}.scale_linear", 1))
    kind = values.get(f"{rope}.scaling.type", "none" if factor in (0, 1) else "linear")  # 0: not scaled
    return kind != "none" or values.get(f"{rope}.scaling.attn_factor", 1) != 1


def _tensors(file: _File, config: TransformerConfig) -> list[Tensor]:
    """Return the tensors of the checkpoint; ValueError if the file lacks one or has others."""
    table, tensors, known = leaves(config), [], set()
    blocks = [(leaf, layer) for layer in range(table.layers) for leaf in table.blocks.values()]
    for leaf, layer in [*((leaf, 0) for leaf in table.resident.values()), *blocks]:
        name = leaf.tensor.format(layer=layer)
        stored = _stored_name(name)
        if stored not in file.tensors:
            raise ValueError(f"{file.path} has no tensor '{stored}'.")
        shape = tuple(int(size) for size in reversed(file.tensors[stored].shape))
        if shape != leaf.stored_shape:
            raise ValueError(f"tensor '{stored}' of {file.path} has shape {list(shape)}, expected {list(leaf.stored_shape)}.")
        known.add(stored)
        tensors.append(Tensor(name, np.dtype(np.float32), shape, functools.partial(_pieces, file, config, stored)))
    unknown = sorted(set(file.tensors) - known)
    if unknown:
        raise ValueError(
            f"tensor '{unknown[0]}' of {file.path} does not belong to a {config.model_type} as this project has it."
        )
    return tensors


def _stored_name(name: str) -> str:
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _pieces(file: _File, config: TransformerConfig, stored: str) -> Iterator[np.ndarray]:
    numbers = file.numbers(stored)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(stored.split(".")[-2])
    if heads is not None and config.model_type == "llama":
        pairs = numbers.reshape(heads, -1, 2, *numbers.shape[1:])  # of rotary positions
        numbers = pairs.swapaxes(1, 2).reshape(numbers.shape)
    yield np.ascontiguousarray(numbers)


def _json(fields: Any) -> bytes:
    return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()
