"""Tasks with verifiable rewards for language models: prompts by name, rewards, and scores made in other processes."""

from eggroll.envs.tasks.answers import final_answer, last_number
from eggroll.envs.tasks.batches import Batches
from eggroll.envs.tasks.calls import InvalidReward, Reward
from eggroll.envs.tasks.named import FORMS, NAMED, named_reward, reward_file
from eggroll.envs.tasks.pass_at_k import pass_at_k
from eggroll.envs.tasks.protocol import SPLITS, Row, Task, check_disjoint, collate
from eggroll.envs.tasks.registry import load, names
from eggroll.envs.tasks.rewards import THINK_ANSWER, Matches, Weighted, math_matches, number_matches
from eggroll.envs.tasks.rows import Rows, read_rows
from eggroll.envs.tasks.scores import MINIMUM, Scores, fill_with_mean
from eggroll.envs.tasks.scoring import RewardFailed, Scorer
from eggroll.envs.tasks.trial import try_reward

__all__ = [
    "FORMS",
    "MINIMUM",
    "NAMED",
    "SPLITS",
    "THINK_ANSWER",
    "Batches",
    "InvalidReward",
    "Matches",
    "Reward",
    "RewardFailed",
    "Row",
    "Rows",
    "Scorer",
    "Scores",
    "Task",
    "Weighted",
    "check_disjoint",
    "collate",
    "fill_with_mean",
    "final_answer",
    "last_number",
    "load",
    "math_matches",
    "named_reward",
    "names",
    "number_matches",
    "pass_at_k",
    "read_rows",
    "reward_file",
    "try_reward",
]
