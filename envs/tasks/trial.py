"""A reward is tried before the model is loaded, so that a bug in it ends a run at once and not after minutes.

It is called with a row each and the completions "", "0" and a text of the row. A reward may fail on odd texts, such as those
without the tag that it looks for: that is an error only where all three calls raise what no text causes, a NameError or an
ImportError.
"""

import re
import warnings
from collections.abc import Sequence

from eggroll.envs.tasks.protocol import Row
from eggroll.envs.tasks.scoring import RewardFailed, Scorer

_BUG = re.compile(r" raised (NameError|UnboundLocalError|ImportError|ModuleNotFoundError): ")


def try_reward(scorer: Scorer, rows: Sequence[Row]) -> None:
    """Call a reward with three completions, of the first rows, until one does not fail.

    Raises:
        RewardFailed: each call raised a NameError, UnboundLocalError or ImportError.
        ValueError: the reward gives another number of scores than there are completions.

    Warns:
        each call failed, in some other way.
    """
    errors: list[str] = []
    texts = [value for value in rows[0].columns.values() if isinstance(value, str)]
    for index, completion in enumerate(["", "0", *(texts or ["a"])[:1]]):
        error = scorer.try_one(rows[min(index, len(rows) - 1)], completion)
        if error is None:
            return
        errors.append(error)
    tried = "on all three texts that it was tried on, '' and '0' among them"
    if all(map(_BUG.search, errors)):
        raise RewardFailed(f"a reward failed {tried}: {errors[0]}")
    warnings.warn(f"a reward failed {tried}: {errors[0]}", stacklevel=2)
