"""Write the files of a checkpoint folder, tensor by tensor.

    model.safetensors:  8 bytes, the length n of the header, little-endian;  n bytes of JSON;  the tensors, without gaps

The bytes of a file are those that safetensors writes for the same tensors. Models above `max_shard_bytes` become several files
and model.safetensors.index.json. New files are written next to the older ones and then renamed. config.json is removed before
the first of the older files and comes last: a folder loads as the older model, as the new one, or not at all.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

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
    """
    for leftover in folder.glob(f"*{PARTIAL}"):  # of a save that was killed
        if _WEIGHTS.fullmatch(leftover.name.removesuffix(PARTIAL)):
            leftover.unlink()
    shards = _split(tensors, max_shard_bytes)
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    others = dict(files)
    if len(shards) == 1:
        names = [SINGLE]
    else:
        others[INDEX] = _index(dict(zip(names, shards, strict=True)))
    for name, shard in zip(names, shards, strict=True):
        write_file(folder / f"{name}{PARTIAL}", shard)
    for name, content in others.items():
        (folder / f"{name}{PARTIAL}").write_bytes(content)
    (folder / CONFIG).unlink(missing_ok=True)
    for old in [path for path in folder.iterdir() if _WEIGHTS.fullmatch(path.name)]:
        old.unlink()
    for name in sorted({*names, *others}, key=lambda name: name == CONFIG):
        (folder / f"{name}{PARTIAL}").replace(folder / name)


def write_file(path: Path, tensors: Sequence[Tensor]) -> None:
    """Write one safetensors file; memory holds one piece of a tensor at a time."""
    ordered = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))  # as safetensors does
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {"dtype": _code(tensor.dtype), "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            written = 0
            for piece in tensor.pieces():
                written += file.write(piece.reshape(-1).view(np.uint8).data)
            if written != tensor.nbytes:
                raise ValueError(f"tensor '{tensor.name}' has {written} bytes, expected {tensor.nbytes}.")


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
