"""A small run of `experiments.reason` in a process of its own, which can end itself in the middle of something.

python -m tests.reason_runs none|score|checkpoint|clock OPTIONS

score: in a call of the reward; checkpoint: while one is written; clock: it is too slow in process 1.
"""

import gc
import os
import signal
import sys
import time

import jax

from eggroll.experiments.common.options import drop_options
from eggroll.experiments.reason import __main__ as reason
from eggroll.experiments.reason.config import parse
from eggroll.experiments.reason.progress import Progress
from eggroll.journal.checkpoint import Checkpoints

TINY = ["--start.steps", "2", "--start.width", "16", "--start.layers", "1", "--start.batch-size", "4"]
TINY += ["--population-size", "4", "--prompts", "2", "--max-new-tokens", "4", "--validation-size", "4", "--test-size", "4"]
TINY += ["--check-every", "2", "--examples", "1", "--task-options", "train=40", "validation=8", "test=8"]
IN_GENERATION_2 = 6  # call of the reward: two checks before training, one of each generation, a check after every second one


def tiny(*options):
    """`TINY` and more options, without those of `TINY` that have no effect with them."""
    return [*drop_options(TINY, parse([*TINY, *options]).ignored()), *options]


def measure_copies(monkeypatch):
    """Measure the bytes of all arrays after every generation, over those of the parameters; what lives now does not count."""

    def live_bytes():
        gc.collect()
        return sum(array.nbytes for array in jax.live_arrays() if not array.is_deleted())

    found, before, count = [], live_bytes(), Progress.__call__

    def measure(self, state, record):
        count(self, state, record)
        found.append((live_bytes() - before) / sum(leaf.nbytes for leaf in jax.tree.leaves(state.params)))

    monkeypatch.setattr(Progress, "__call__", measure)
    return found


def letters(prompts, completions, **_):
    """A reward that a model which has learned nothing gets some of."""
    return [float(sum(map(ord, text)) % 7) for text in completions]


class Ending:
    """The reward `letters`, with something else in one of its calls."""

    def __init__(self, at, end):
        self.calls, self._at, self._end = 0, at, end

    def __call__(self, prompts, completions, **columns):
        self.calls += 1
        if self.calls == self._at:
            self._end()
        return letters(prompts, completions, **columns)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def save_and_die(save):
    def saved(*given, **options):
        save(*given, **options)
        die()

    return saved


if __name__ == "__main__":
    moment, *options = sys.argv[1:]
    sys.modules["eggroll.envs.tasks.arithmetic"].answer_matches = Ending(IN_GENERATION_2 if moment == "score" else 0, die)
    if moment == "checkpoint":
        Checkpoints.save = save_and_die(Checkpoints.save)
    if moment == "clock" and os.environ["JAX_PROCESS_ID"] == "1":
        clock = time.perf_counter
        time.perf_counter = lambda: 0.01 * clock()
    reason.main(tiny(*options))
