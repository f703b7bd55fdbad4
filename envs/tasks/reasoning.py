"""Tasks of reasoning-gym: problems made from seeds on demand, scored by the data set that made them.

Problem i of a split is the one that the data set makes from the seed first + i. Splits own ranges of seeds, which overlap for
no `seed`. Different seeds can make equal problems: a validation problem that is in test, or a train problem that is in
either, is dropped, and a further seed makes another.
"""

import dataclasses
from collections.abc import Sequence
from types import ModuleType
from typing import Any, overload

from eggroll.envs.tasks.answers import final_answer
from eggroll.envs.tasks.protocol import SPLITS, Row, Task

PREFIX = "reasoning_gym/"
SEEDS = 2**20  # that a split owns; some data sets take seeds of 32 bits only
TRIES = 100  # seeds to try for a problem that no other split has


def reasoning(
    dataset: str, *, seed: int = 0, train: int = 65536, validation: int = 128, test: int = 256, **config: Any
) -> Task:
    """Make a task of a data set.

    Args:
        dataset: a name of reasoning-gym's, such as "countdown".
        seed: from 0 to 1,364; chooses the problems.
        train: problems an epoch; each is made when it is read.
        validation, test: problems that are made at once.
        config: the data set's own options, such as `min_numbers=3`.

    Returns:
        The task; its columns are what the data set made: `question`, `answer`, `metadata`.

    Raises:
        ModuleNotFoundError: reasoning-gym is not installed.
        ValueError: an unknown data set, `seed` or a size out of its bounds, or too few problems for splits without overlap.
    """
    known = datasets()
    name = PREFIX + dataset
    if dataset not in known:
        raise ValueError(f"reasoning_gym must have the data set, got {dataset!r}; it has {', '.join(known)}.")
    if not 0 <= seed < 2**32 // (len(SPLITS) * SEEDS):
        raise ValueError(f"seed must be between 0 and {2**32 // (len(SPLITS) * SEEDS) - 1}, got {seed}.")
    if not 1 <= min(train, validation, test) <= max(train, validation, test) <= SEEDS:
        raise ValueError(f"train, validation and test must be between 1 and {SEEDS}, got {train}, {validation} and {test}.")
    firsts = {split: (len(SPLITS) * seed + index) * SEEDS for index, split in enumerate(SPLITS)}
    maker = Maker(dataset, config)
    tested = tuple(Problems(maker, firsts["test"], test))
    validated = tuple(Problems(maker, firsts["validation"], validation, _prompts(tested)))
    trained = Problems(maker, firsts["train"], train, _prompts(tested + validated))
    splits = {"train": trained, "validation": validated, "test": tested}
    return Task(name, reward=ScoreAnswer(dataset, config), splits=splits)


def datasets() -> list[str]:
    """Return the names of reasoning-gym's data sets.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    return sorted(set(_library().factory.DATASETS) - {"composite"})  # which is a mixture of data sets


def _library() -> ModuleType:
    try:
        import reasoning_gym
    except ModuleNotFoundError as error:
        message = f"tasks of reasoning-gym need the module {error.name}; pip install 'reasoning-gym>=0.1.25' installs it."
        raise ModuleNotFoundError(message, name=error.name) from error
    return reasoning_gym


@dataclasses.dataclass(frozen=True)
class Maker:
    """Make problems from seeds."""

    dataset: str
    config: dict[str, Any]

    def __call__(self, seed: int) -> Row:
        """Return the problem of a seed."""
        entry = _library().create_dataset(self.dataset, size=1, seed=seed, **self.config)[0]
        return Row(entry["question"], {name: entry[name] for name in ("question", "answer", "metadata")})


@dataclasses.dataclass(frozen=True)
class Problems(Sequence[Row]):
    """The problems of a range of seeds, made when they are read, without those of other splits."""

    make: Maker
    first: int
    size: int
    excluded: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Row, ...]: ...
    def __getitem__(self, index):
        """Return a problem, or a tuple of some.

        Raises:
            IndexError: `index` is out of bounds.
            ValueError: only problems of other splits were found.
        """
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(self.size)))
        place = range(self.size)[index]
        for attempt in range(TRIES):
            row = self.make(self.first + (place + attempt * self.size) % SEEDS)
            if row.prompt not in self.excluded:
                return row
        raise ValueError(
            f"{PREFIX}{self.make.dataset} must have more problems than validation and test hold, {len(self.excluded)}, but"
            f" {TRIES} seeds gave no other; ask for fewer, or for options with more problems."
        )


@dataclasses.dataclass(frozen=True)
class ScoreAnswer:
    """The data set's own score of an answer, from 0 to 1; some give a little for a well-formed wrong answer.

    Some evaluate the answer as an expression, which can take forever: score with workers.
    """

    dataset: str
    config: dict[str, Any]

    def __reduce__(self) -> tuple:
        return _score_answer, (self.dataset, self.config)

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        *,
        question: Sequence[str],
        answer: Sequence[Any],
        metadata: Sequence[dict],
        **_: Any,
    ) -> list[float]:
        """Score the completions."""
        dataset = _library().create_dataset(self.dataset, size=1, seed=0, **self.config)
        entries = [{"question": q, "answer": a, "metadata": m} for q, a, m in zip(question, answer, metadata, strict=True)]
        return [float(dataset.score_answer(final_answer(c), e)) for c, e in zip(completions, entries, strict=True)]


def _score_answer(dataset: str, config: dict[str, Any]) -> ScoreAnswer:
    """Import the library when a worker starts, not in its first call, which has a time limit."""
    _library()
    return ScoreAnswer(dataset, config)


def _prompts(rows: tuple[Row, ...]) -> frozenset[str]:
    return frozenset(row.prompt for row in rows)
