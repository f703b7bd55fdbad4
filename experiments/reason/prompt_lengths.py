"""The few lengths that prompts are padded to: what their batches need, so that little of a prefill is padding.

Every length is compiled once. A batch with a longer prompt than expected gets the next multiple of `STEP`. The length is a
function of the batch, so that a resumed run has the same.
"""

from typing import NamedTuple

SAMPLE = 256  # rows of a train split that makes them when they are read
STEP = 16  # tokens between the lengths of longer batches


class Lengths(NamedTuple):
    """The lengths of a run, in tokens."""

    train: int  # the longest prompt of the train split, or of `SAMPLE` rows of it
    held_out: int  # the longest held-out prompt
    most: float  # of a prompt: --prompt-length, or what the context of the model leaves

    @property
    def longest(self) -> int:
        """The longest prompt that is known in advance."""
        return max(self.train, self.held_out)

    def of_batch(self, longest: int, *, held_out: bool, prompt: str) -> int:
        """Return what to pad a batch to.

        Args:
            longest: tokens of its longest prompt.
            held_out: whether its rows are held-out ones.
            prompt: the longest one, for the message.

        Raises:
            ValueError: it is longer than `most`.
        """
        if longest > self.most:
            needed = f"prompt_length must be at least {longest}, the tokens of the prompt {prompt[:60]!r}"
            raise ValueError(f"{needed}; there is room for {self.most:g}.")
        usual = self.held_out if held_out else self.train
        return usual if longest <= usual else int(min(self.most, -(-longest // STEP) * STEP))
