"""Accuracy of unperturbed parameters on held-out problems, by greedy completions; what checks tell and keep."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from eggroll.envs import tasks
from eggroll.experiments.reason.problem import Problem, Sampling, key_data

AT_A_TIME = 128  # problems of a program


class Check(NamedTuple):
    """What held-out problems gave."""

    accuracy: float  # mean score; the share of right answers where scores are 0 and 1
    ended: float  # share of completions that ended by themselves
    tokens: float  # of a completion, mean
    examples: list[tuple[str, str, float]]  # prompt, completion, score


class Validation:
    """Checks parameters on the first problems of a split; compiled once.

    Args:
        problem: the model and the task.
        split: of the task.
        size: problems at most.
        sampling: of training; here completions are greedy.
    """

    def __init__(self, problem: Problem, split: str, *, size: int, sampling: Sampling):
        rows = problem.task.split(split)
        self._rows = [rows[index] for index in range(min(size, len(rows)))]
        self._problem, self._sampling = problem, sampling._replace(temperature=0.0, top_p=1.0)
        self._complete = jax.jit(self._greedy)

    def _greedy(self, params: Any, prompts: Any) -> Any:
        return self._problem.complete(params, prompts, key_data(0), sampling=self._sampling)

    def __call__(self, params: Any, *, examples: int = 0) -> Check:
        """Check."""
        done = [self._part(params, self._rows[first : first + AT_A_TIME]) for first in range(0, len(self._rows), AT_A_TIME)]
        texts = [text for judged, _ in done for text in judged.texts]
        scores = np.concatenate([judged.scores.values for judged, _ in done])
        ended, length = (np.concatenate([getattr(made, name) for _, made in done]) for name in ("ended", "length"))
        shown = [(self._rows[i].prompt, texts[i], float(scores[i])) for i in range(min(examples, len(texts)))]
        return Check(float(scores.mean()), float(ended.mean()), float(length.mean()), shown)

    def _part(self, params: Any, rows: Sequence[tasks.Row]) -> Any:
        size = min(AT_A_TIME, len(self._rows))
        filled = [*rows, *[rows[0]] * (size - len(rows))]  # the last part has the shape of the others
        made = jax.device_get(self._complete(params, self._problem.prompts(filled)))
        made = type(made)(*(array[: len(rows)] for array in made))
        return self._problem.judge(rows, made), made
