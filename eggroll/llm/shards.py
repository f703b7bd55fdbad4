"""The tensors of a checkpoint folder: one model.safetensors, or shards listed in model.safetensors.index.json."""

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eggroll.files import parse_object
from eggroll.llm.sums import verify

_FILE_NAME = re.compile(r"(?!\.{1,2}$)[^/\\\x00-\x1f]{1,200}")  # without a folder
FLOATS = ("F64", "F32", "F16", "BF16")  # dtypes of safetensors
CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that contains an object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it contains anything else, or differs from its line in SHA256SUMS.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}.")
    verify(path)
    return parse_object(path.read_bytes(), path)


class Shards:
    """The weight files of a folder; tensors are read one at a time, so that memory holds only one.

    A file is opened for every tensor: safetensors maps files, and what was read of a mapping stays in memory until it closes.

    Args:
        folder: with model.safetensors, or model.safetensors.index.json and what it lists. Files that have a line in SHA256SUMS
            are compared with it first.
        verified: whether to compare them; otherwise only the headers of the weights are read.

    Raises:
        FileNotFoundError: no weights, or a listed file is missing.
        ValueError: a file is damaged.
        ImportError: the package safetensors is not installed.
    """

    def __init__(self, folder: Path, *, verified: bool = True):
        if (folder / SINGLE).is_file():
            names = [SINGLE]
        elif (folder / INDEX).is_file():
            listed = read_object(folder / INDEX).get("weight_map")
            if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
                raise ValueError(f"{folder / INDEX} has no 'weight_map' of tensor names to file names.")
            names = sorted(set(listed.values()))
            outside = [name for name in names if not _FILE_NAME.fullmatch(name)]
            if outside:
                raise ValueError(f"'weight_map' of {folder / INDEX} must name files of the folder, got {outside[0][:80]!r}.")
        else:
            raise FileNotFoundError(f"{folder} has no weights: expected {SINGLE}, or {INDEX} with its shards.")
        self.folder = folder
        self._paths: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        for path in (folder / name for name in names):
            if verified:
                verify(path)
            with _open(path) as file:
                for name in file.keys():  # noqa: SIM118
                    self._paths[name], self._shapes[name] = path, tuple(file.get_slice(name).get_shape())
                    self._dtypes[name] = file.get_slice(name).get_dtype()

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._paths)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, which must exist."""
        return self._shapes[name]

    def find(self, names: tuple[str, ...], shape: tuple[int, ...]) -> str:
        """Return the first of the names that exists; ValueError if none does, or its shape or dtype does not fit."""
        name = next((name for name in names if name in self._paths), None)
        if name is None:
            raise ValueError(f"{self.folder} has no tensor '{names[0]}', expected with shape {list(shape)}.")
        got = self.shape(name)
        if _drop_leading_ones(got) != _drop_leading_ones(shape):
            raise ValueError(f"tensor '{name}' has shape {list(got)}, but config.json expects {list(shape)}.")
        if self._dtypes[name] not in FLOATS:
            raise ValueError(f"tensor '{name}' must be of {', '.join(FLOATS)}, got {self._dtypes[name]}.")
        return name

    def read(self, names: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
        """Read one tensor: `read_pieces` without a limit."""
        return next(self.read_pieces(names, shape, limit=None))[1]

    def read_pieces(
        self, names: tuple[str, ...], shape: tuple[int, ...], *, limit: int | None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Read one tensor in pieces of whole rows.

        Args:
            names: its possible names; the first that exists is read.
            shape: expected; leading axes of size 1 are ignored.
            limit: most numbers in a piece, if a row has no more; None: the tensor in one piece.

        Yields:
            Index of the first row and the rows, in the dtype of the file.

        Raises:
            ValueError: it is missing, or its shape differs.
        """
        name = self.find(names, shape)
        got = self.shape(name)
        with _open(self._paths[name]) as file:
            if limit is None or got != shape or math.prod(got) <= limit:
                yield 0, file.get_tensor(name).reshape(shape)
                return
            rows, tensor = max(1, limit // math.prod(got[1:])), file.get_slice(name)
            for start in range(0, got[0], rows):
                yield start, tensor[start : min(start + rows, got[0])]


def _drop_leading_ones(shape: Sequence[int]) -> list[int]:
    """The shape without leading axes of size 1."""
    return list(itertools.dropwhile(lambda size: size == 1, shape))


def _open(path: Path) -> Any:
    import safetensors

    if not path.is_file():
        raise FileNotFoundError(f"{path.parent / INDEX} lists {path.name}, which does not exist.")
    try:
        return safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}.") from None
