"""Checkpoints in the Hugging Face layout: a folder with config.json and safetensors. Needs `pip install '.[llm]'`."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from eggroll.llm.decoder import Decoder
from eggroll.llm.int8 import dequantise
from eggroll.llm.models.families import FAMILIES, Config, family_of, make_decoder, make_generator
from eggroll.llm.models.leaves import Leaf, check_params
from eggroll.llm.shards import CONFIG, SINGLE, Shards, read_object

__all__ = ["FAMILIES", "Config", "load", "make_decoder", "make_generator", "read_config", "save"]
HEAD = "lm_head.weight"
_COPIED = (  # files of a checkpoint that training does not change
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)


def load(folder: str | Path, dtype: DTypeLike = jnp.float32) -> tuple[Config, Decoder, Any]:
    """Load a model. Host memory holds one stacked parameter at a time, in addition to those already loaded.

    Args:
        folder: with config.json and model.safetensors, or model.safetensors.index.json and its shards.
        dtype: of all parameters; float32 or bfloat16.

    Returns:
        Its configuration, its decoder, its parameters.

    Raises:
        FileNotFoundError: no config.json, no weights, or a missing shard.
        ValueError: an unknown model_type or variant, a missing tensor, an unexpected tensor that would change the model, a
            wrong shape, a damaged file, a dtype that is not floating.
    """
    folder, dtype = Path(folder), jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be a floating one such as float32 or bfloat16, got {dtype}.")
    config = read_config(folder)
    family, shards = family_of(config), Shards(folder)
    config = family.detect_names(config, shards.names)
    leaves = family.leaves(config)
    resident = {name: jnp.asarray(_read(shards, leaf, 0).astype(dtype)) for name, leaf in leaves.resident.items()}
    blocks = {name: _read_stack(shards, leaf, leaves.layers, dtype) for name, leaf in leaves.blocks.items()}
    _check_rest(shards, family.ignored_tensors, config)
    return config, make_decoder(config), {"resident": resident, "blocks": blocks}


def read_config(folder: str | Path) -> Config:
    """Read the config.json of a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or the model is not supported.
    """
    path = Path(folder) / CONFIG
    fields = read_object(path)
    if fields.get("model_type") not in FAMILIES:
        got = repr(fields["model_type"]) if "model_type" in fields else "none"
        raise ValueError(f"model_type in {path} must be one of {', '.join(FAMILIES)}, got {got}.")
    return FAMILIES[fields["model_type"]].from_fields(fields)


def _read(shards: Shards, leaf: Leaf, layer: int) -> np.ndarray:
    name = leaf.tensor.format(layer=layer)
    array = shards.read((name, name.removeprefix("model.")), leaf.stored_shape)  # a headless model has no "model."
    return array.T if leaf.transposed else array.reshape(leaf.shape)


def _check_rest(shards: Shards, ignored: str, config: Config) -> None:
    """Raise ValueError if a tensor that was not read would change the model."""
    for name in sorted(shards.names - shards.read_names):
        if config.tie_word_embeddings and name == HEAD:
            embedding = next(known for known in shards.read_names if known.endswith("embed_tokens.weight"))
            shape = shards.shape(embedding)
            if not np.array_equal(shards.read((name,), shape), shards.read((embedding,), shape)):
                raise ValueError(f"tensor '{HEAD}' differs from '{embedding}', but config.json ties them.")
        elif not re.fullmatch(ignored, name):
            raise ValueError(f"tensor '{name}' does not belong to the '{config.model_type}' that config.json describes.")


def _read_stack(shards: Shards, leaf: Leaf, layers: int, dtype: Any) -> Array:
    stack = np.empty((layers, *leaf.shape), dtype)
    stack[: leaf.first_layer] = 0
    for layer in range(leaf.first_layer, layers):
        stack[layer] = _read(shards, leaf, layer)
    return jax.block_until_ready(jax.device_put(stack))  # otherwise the host holds the stacks of several transfers


def save(folder: str | Path, config: Config, params: Any, *, source: str | Path | None = None) -> Path:
    """Save a model for transformers and `load`: config.json and model.safetensors, each written atomically.

    Args:
        folder: created if missing.
        config: of the model.
        params: its parameters, of one dtype; int8 matrices (`int8.quantise`) are saved as floats.
        source: folder that the model was loaded from; its tokenizer and other settings are copied.

    Returns:
        The folder.

    Raises:
        ValueError: `params` are not those of `config`.
    """
    from safetensors.numpy import save_file

    folder, family = Path(folder), family_of(config)
    leaves, params = family.leaves(config), dequantise(params)
    check_params(leaves, params)
    tensors = {leaf.tensor: _to_stored(leaf, params["resident"][name]) for name, leaf in leaves.resident.items()}
    for name, leaf in leaves.blocks.items():
        stack = np.asarray(params["blocks"][name])
        for layer in range(leaf.first_layer, leaves.layers):
            tensors[leaf.tensor.format(layer=layer)] = _to_stored(leaf, stack[layer])
    dtype = str(params["resident"]["embed"].dtype)
    fields = family.to_fields(config) | {"dtype": dtype}
    folder.mkdir(parents=True, exist_ok=True)
    if source is not None:
        fields = read_object(Path(source) / CONFIG) | fields
        fields.pop("torch_dtype", None)  # the older name of dtype
        _copy_files(Path(source), folder)
    partial = folder / f"{SINGLE}.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(folder / SINGLE)
    partial = folder / f"{CONFIG}.partial"
    partial.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / CONFIG)
    return folder


def _copy_files(source: Path, folder: Path) -> None:
    for name in _COPIED:
        if (source / name).is_file() and source.resolve() != folder.resolve():
            shutil.copyfile(source / name, folder / name)


def _to_stored(leaf: Leaf, value: Any) -> np.ndarray:
    array = np.asarray(value)
    return np.ascontiguousarray(array.T if leaf.transposed else array.reshape(leaf.stored_shape))
