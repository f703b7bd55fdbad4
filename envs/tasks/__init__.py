"""Tasks with verifiable rewards for language models: prompts by name, rewards, and scores made in other processes."""

from envs.tasks.answers import final_answer, last_number
from envs.tasks.batches import Batches
from envs.tasks.pass_at_k import any_of_k, pass_at_k
from envs.tasks.protocol import SPLITS, Reward, Row, Task, check_disjoint, collate
from envs.tasks.registry import load, names
from envs.tasks.rewards import THINK_ANSWER, Matches, Weighted, math_matches, number_matches
from envs.tasks.scoring import MINIMUM, Scorer, Scores

__all__ = [
    "MINIMUM",
    "SPLITS",
    "THINK_ANSWER",
    "Batches",
    "Matches",
    "Reward",
    "Row",
    "Scorer",
    "Scores",
    "Task",
    "Weighted",
    "any_of_k",
    "check_disjoint",
    "collate",
    "final_answer",
    "last_number",
    "load",
    "math_matches",
    "names",
    "number_matches",
    "pass_at_k",
]
