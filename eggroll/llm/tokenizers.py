"""Text to tokens: bytes, without any package, or the tokenizer.json of a checkpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from eggroll.llm.sums import verify


class Tokenizer(Protocol):
    """The interface of a tokenizer."""

    vocab_size: int  # every token is below it
    prefix: tuple[int, ...]  # tokens at the start of every text

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, without `prefix`."""

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Return the text of tokens, with that of special ones such as "</s>" if asked for."""


class ByteTokenizer:
    """The bytes of UTF-8 as tokens 0 to 255; 256 starts a text, and has no text of its own."""

    vocab_size = 257
    prefix: tuple[int, ...] = (256,)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, without `prefix`."""
        return list(text.encode("utf-8"))

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Return the text of tokens; the special one has none."""
        return bytes(token for token in tokens if token < 256).decode("utf-8", errors="replace")


class FileTokenizer:
    """A Hugging Face tokenizer.json. Needs `pip install '.[llm]'`.

    Args:
        path: of the file, or of the folder that holds it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or differs from its line in SHA256SUMS.
    """

    def __init__(self, path: str | Path):
        import tokenizers

        path = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no tokenizer at {path}.")
        verify(path)
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(path))
            self._tokenizer.no_padding()
            self._tokenizer.no_truncation()
            self.vocab_size: int = 1 + max(self._tokenizer.get_vocab().values(), default=-1)
            bare, whole = self.encode("a"), self._tokenizer.encode("a").ids
        except BaseException as error:  # the package raises no narrower class, and its panics are no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise ValueError(f"{path} is not a tokenizer.json: {str(error).rstrip('.') or type(error).__name__}.") from None
        if self.vocab_size < 1:
            raise ValueError(f"{path} has no tokens.")
        starts = [start for start in range(len(whole)) if whole[start : start + len(bare)] == bare]
        self.prefix: tuple[int, ...] = tuple(whole[: starts[0]]) if starts else ()

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, without `prefix`; special tokens such as "</s>" are recognised.

        Raises:
            ValueError: the tokenizer has no token for a part of it.
        """
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the package raises no narrower class
            raise ValueError(f"the tokenizer cannot encode {text[:20]!r}: {error}.") from None

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Return the text of tokens, with that of special ones such as "</s>" if asked for."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=not special)


def load_tokenizer(folder: str | Path, *, vocab_size: int) -> Tokenizer:
    """Load the tokenizer of a checkpoint: its tokenizer.json, or bytes if it has none and 257 tokens.

    Args:
        folder: of the checkpoint.
        vocab_size: of the model.

    Raises:
        FileNotFoundError: there is no tokenizer.
        ValueError: it is damaged, or has more tokens than the model.
    """
    folder = Path(folder)
    if vocab_size == ByteTokenizer.vocab_size and not (folder / "tokenizer.json").exists():
        return ByteTokenizer()
    tokenizer = FileTokenizer(folder)
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(f"the tokenizer in {folder} has {tokenizer.vocab_size} tokens, the model {vocab_size}.")
    return tokenizer
