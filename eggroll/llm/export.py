"""Write the files of a checkpoint folder, tensor by tensor.

    model.safetensors:  8 bytes, the length n of the header, little-endian;  n bytes of JSON;  the tensors, without gaps

The bytes of a file are those that safetensors writes for the same tensors. Models above `max_shard_bytes` become several files
and model.safetensors.index.json. New files are written next to the older ones and then renamed. config.json is removed before
the first of the older files and comes last, after SHA256SUMS, which has the digests of all files: a folder loads as the older
model, as the new one, or not at all. Files and folder are flushed to disk in that order.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from eggroll.files import naming, sync
from eggroll.llm import sums
from eggroll.llm.shards import CONFIG, INDEX, SINGLE
from eggroll.llm.stacks import Tensor

PARTIAL = ".partial"
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def replace_checkpoint(folder: Path, tensors: Sequence[Tensor], files: Mapping[str, bytes], *, max_shard_bytes: int) -> None:
    """Write a checkpoint in the place of the one in the folder, if there is one.

    Args:
        folder: exists.
        tensors: all weights, in the order of the files.
        files: content of the other files by name, config.json among them.
        max_shard_bytes: most bytes of tensors in a file, >= 1; a larger tensor has a file to itself.

    Raises:
        ValueError: a dtype that is not float16, bfloat16, float32 or float64.
        OSError: the files cannot be written; the older checkpoint is unchanged.
    """
    for leftover in folder.glob(f"*{PARTIAL}"):  # of a save that was killed
        if _is_ours(leftover.name.removesuffix(PARTIAL)):
            leftover.unlink()
    shards = _split(tensors, max_shard_bytes)
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    others = dict(files)
    if len(shards) == 1:
        names = [SINGLE]
    else:
        others[INDEX] = _index(dict(zip(names, shards, strict=True)))
    try:
        digests = _kept_sums(folder)
        for name, shard in zip(names, shards, strict=True):
            digests[name] = write_file(folder / f"{name}{PARTIAL}", shard)
        digests |= {name: hashlib.sha256(content).hexdigest() for name, content in others.items()}
        others[sums.NAME] = sums.write_sums(digests)
        for name, content in others.items():
            _write_flushed(folder / f"{name}{PARTIAL}", content)
    except BaseException:
        for name in (*names, *others):
            (folder / f"{name}{PARTIAL}").unlink(missing_ok=True)
        raise
    _put_in_place(folder, [*names, *others])


def _is_ours(name: str) -> bool:
    """Whether a file belongs to the checkpoint itself."""
    return _WEIGHTS.fullmatch(name) is not None or name == sums.NAME


def _kept_sums(folder: Path) -> dict[str, str]:
    """The lines of the older SHA256SUMS for files that stay, such as a tokenizer's."""
    try:
        stored = sums.read_sums(folder)
    except ValueError:
        return {}
    return {name: digest for name, digest in stored.items() if not _is_ours(name) and (folder / name).is_file()}


def _write_flushed(path: Path, content: bytes) -> None:
    with naming(path):
        path.write_bytes(content)
    sync(path)


def _put_in_place(folder: Path, names: Sequence[str]) -> None:
    """Remove the older checkpoint and name the new files, config.json last."""
    (folder / CONFIG).unlink(missing_ok=True)
    sync(folder)
    for old in [path for path in folder.iterdir() if _is_ours(path.name)]:
        old.unlink()
    for name in names:
        if name != CONFIG:
            (folder / f"{name}{PARTIAL}").replace(folder / name)
    sync(folder)
    (folder / f"{CONFIG}{PARTIAL}").replace(folder / CONFIG)
    sync(folder)


def write_file(path: Path, tensors: Sequence[Tensor]) -> str:
    """Write one safetensors file and flush it; memory holds one piece of a tensor at a time.

    Returns:
        Its SHA-256.
    """
    ordered = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))  # as safetensors does
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {"dtype": _code(tensor.dtype), "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(head)
    with naming(path), path.open("wb") as file:
        file.write(head)
        for tensor in ordered:
            written = 0
            for piece in tensor.pieces():
                content = piece.reshape(-1).view(np.uint8).data
                digest.update(content)
                written += file.write(content)
            if written != tensor.nbytes:
                raise ValueError(f"tensor '{tensor.name}' has {written} bytes, expected {tensor.nbytes}.")
    sync(path)
    return digest.hexdigest()


def _code(dtype: np.dtype) -> str:
    """The name of a dtype in safetensors."""
    if dtype.name not in _CODES:
        raise ValueError(f"parameters must be of {', '.join(_CODES)} to be saved, got {dtype.name}.")
    return _CODES[dtype.name]


def _split(tensors: Sequence[Tensor], max_shard_bytes: int) -> list[list[Tensor]]:
    """Cut the list wherever a file would become too large."""
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _index(shards: Mapping[str, Sequence[Tensor]]) -> bytes:
    weight_map = {tensor.name: name for name, shard in shards.items() for tensor in shard}
    total = sum(tensor.nbytes for shard in shards.values() for tensor in shard)
    return (json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n").encode()
