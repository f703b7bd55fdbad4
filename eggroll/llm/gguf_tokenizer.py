"""The tokenizer of a GGUF file as a tokenizer.json: byte-level BPE, its vocabulary, merges and rule that cuts a text.

A file names the rule (`tokenizer.ggml.pre`); `_CUTS` has those of the supported families, as their own tokenizer.json do. For
SmolLM2 transformers leaves out the cut around digits when it reads a GGUF file, which changes the tokens of two spaces before a
digit. Fields that a file lacks are those that llama.cpp assumes; without a rule or kinds of tokens it would guess: an error.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

_CONTROL, _USER_DEFINED = 3, 4  # kinds of tokens that are found before a text is cut
_TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}  # in tokenizer_config.json, in the file
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class GGUFTokenizer(NamedTuple):
    """The files of a tokenizer, and what config.json has of it."""

    fields: dict[str, Any]  # of tokenizer.json
    settings: dict[str, Any]  # of tokenizer_config.json
    ids: dict[str, int]  # bos_token_id, eos_token_id, pad_token_id
    chat_template: str | None


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(digits: str) -> list[dict[str, Any]]:
    split = {"type": "Split", "pattern": {"Regex": _WORDS % digits}, "behavior": "Isolated", "invert": False}
    return [split, _byte_level(use_regex=False)]


_CUTS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_byte_level(use_regex=True)],
    "smollm": [{"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)],
    "llama-bpe": _split("{1,3}"),
    "qwen2": _split(""),
}


def read_tokenizer(values: Mapping[str, Any], path: Path, *, vocab_size: int) -> GGUFTokenizer:
    """Convert the tokenizer of a file.

    Args:
        values: fields of the file.
        path: of the file, for messages.
        vocab_size: of the model.

    Raises:
        ValueError: a kind of tokenizer that is not supported, or fields that do not fit.
    """

    def field(name: str, default: Any = None) -> Any:
        return values.get(f"tokenizer.{name}", default)

    kind, cut = field("ggml.model"), field("ggml.pre")
    if kind != "gpt2" or cut not in _CUTS:
        known = f"gpt2 (byte-level BPE) that cuts texts as {', '.join(_CUTS)}"
        raise ValueError(f"the tokenizer of {path} must be {known}, got {kind!r}, {cut!r}; convert it with transformers.")
    tokens, kinds, merges = (field(f"ggml.{name}") for name in ("tokens", "token_type", "merges"))
    if not all(isinstance(part, list) for part in (tokens, kinds, merges)) or not (
        len(tokens) == len(kinds) == len(set(tokens)) == vocab_size
    ):
        raise ValueError(f"the tokenizer of {path} must have {vocab_size} different tokens, their kinds and a list of merges.")
    added = [
        {"id": index, "content": token, **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)}
        | {"special": kind == _CONTROL}
        for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    ids = {name: int(at) for name, stored in _TOKENS.items() if (at := field(f"ggml.{stored}_token_id")) is not None}
    outside = [name for name, at in ids.items() if not 0 <= at < len(tokens)]
    if outside:
        raise ValueError(f"the {outside[0]} token of {path} must be below {len(tokens)}, got {ids[outside[0]]}.")
    is_llama3 = cut == "llama-bpe"
    starts = field("ggml.add_bos_token", is_llama3)
    if starts and "bos" not in ids:
        raise ValueError(f"the tokenizer of {path} begins texts with bos, but has no 'tokenizer.ggml.bos_token_id'.")
    fields = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if cut == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _CUTS[cut]},
        "post_processor": _start(tokens[ids["bos"]], ids["bos"]) if starts else None,
        "decoder": _byte_level(use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": is_llama3,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in merges],
        },
    }
    settings = {f"{name}_token": tokens[at] for name, at in ids.items()}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    named = {f"{name}_token_id": at for name, at in ids.items() if name != "unk"}
    return GGUFTokenizer(fields, settings, named, field("chat_template"))


def _start(token: str, index: int) -> dict[str, Any]:
    """The rule that begins every text with a token."""
    special = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, special, second],
        "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]}},
    }
