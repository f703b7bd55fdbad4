"""The contents that a run is made of (`experiments.common.contents`): the user's rows and the code of the reward.

A replay needs the rows, of which the small model may be trained, and never the reward.
"""

import contextlib
import hashlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eggroll.envs.tasks import Reward, reward_file
from eggroll.envs.tasks.calls import name_of
from eggroll.experiments.common.contents import Contents
from eggroll.llm.sums import digest_file


def read_contents(data: Path | None, rewards: Sequence[str] | None, *, function: Reward | None = None) -> Contents | None:
    """Return the digests of the file with rows and of those with rewards, not of what these import; None without any.

    Args:
        data: the file with rows.
        rewards: names of rewards.
        function: a reward that was passed as a function; its source is digested where Python has it.

    Raises:
        OSError: a file cannot be read.
    """
    files = {str(data): data} | {name.rpartition(":")[0]: reward_file(name) for name in rewards or ()}
    found = {name: digest_file(file) for name, file in files.items() if file is not None}
    with contextlib.suppress(TypeError, OSError):  # an object, or typed into a prompt
        found |= {} if function is None else {f"reward {name_of(function)}": _digest_source(function)}
    return found or None


def _digest_source(function: Any) -> str:
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()
