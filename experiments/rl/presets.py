"""Options of `experiments.rl` for known tasks: the EGGROLL paper's, and those for a small machine.

The paper's are for its 16 reinforcement-learning tasks (arXiv 2511.16652, appendix N.4). It searched 20 random settings per
task; these are its choices for EGGROLL, with policies of three layers of 256. Its choices for OpenES and PPO are not here:
with dense noise, a row is EGGROLL's setting without its rank.
"""

import difflib
from typing import Any, NamedTuple


class Preset(NamedTuple):
    """One row of the paper's tables."""

    population: int
    n_eval: int  # episodes per member
    rank: int
    optimizer: str  # sgd in the paper's scale, see `eggroll.paper_learning_rate`
    lr: float
    lr_decay: float  # factor per generation
    sigma: float
    sigma_decay: float  # factor per generation
    rank_transform: bool  # centred ranks, else z-scores
    deterministic: bool  # actions of training


PAPER = {
    "CartPole-v1": Preset(2048, 1, 4, "sgd", 0.1, 0.9995, 0.2, 0.999, False, False),
    "Pendulum-v1": Preset(4096, 1, 4, "adam", 0.01, 0.995, 0.05, 0.995, False, False),
    "brax/ant": Preset(2048, 1, 1, "adam", 0.01, 0.9995, 0.05, 0.9995, False, False),
    "brax/humanoid": Preset(4096, 8, 1, "adam", 0.1, 1.0, 0.2, 0.9995, True, True),
    "brax/inverted_double_pendulum": Preset(2048, 1, 2, "adam", 0.1, 1.0, 0.5, 0.995, True, True),
    "craftax/Craftax-Classic-Symbolic-v1": Preset(2048, 4, 1, "sgd", 0.01, 0.995, 0.05, 1.0, False, False),
    "craftax/Craftax-Symbolic-v1": Preset(512, 1, 4, "sgd", 0.01, 0.999, 0.05, 0.999, True, False),
    "jumanji/Game2048-v1": Preset(1024, 4, 1, "adamw", 0.1, 1.0, 0.5, 0.9995, False, False),
    "jumanji/Knapsack-v1": Preset(1024, 4, 4, "sgd", 0.1, 0.999, 0.05, 1.0, True, False),
    "jumanji/Snake-v1": Preset(4096, 8, 1, "adam", 0.001, 0.9995, 0.05, 0.9995, True, False),
    "kinetix/l/hard_pinball": Preset(2048, 8, 4, "sgd", 0.01, 0.995, 0.05, 0.999, True, True),
    "kinetix/m/h17_thrustcontrol_left": Preset(512, 4, 4, "sgd", 0.1, 0.9995, 0.5, 1.0, True, False),
    "kinetix/s/h1_thrust_over_ball": Preset(512, 1, 1, "adamw", 0.1, 0.995, 0.5, 0.9995, True, False),
    "navix/DoorKey-8x8-v0": Preset(1024, 1, 1, "adamw", 0.01, 0.9995, 0.05, 1.0, False, False),
    "navix/Dynamic-Obstacles-6x6-Random-v0": Preset(512, 4, 2, "adam", 0.01, 0.999, 0.05, 1.0, False, False),
    "navix/FourRooms-v0": Preset(2048, 4, 4, "sgd", 0.01, 0.999, 0.05, 0.9995, True, False),
}


def paper_settings(env: str) -> dict[str, Any]:
    """Return the paper's row of a task as options of `experiments.rl`.

    Args:
        env: name of the environment; variants after "@" and craftax's "-AutoReset" forms share a row.

    Returns:
        Option -> value.

    Raises:
        ValueError: the paper has no such task; the message suggests the nearest.
    """
    name = env.partition("@")[0].replace("-AutoReset", "")
    if name not in PAPER:
        near = difflib.get_close_matches(name, PAPER, n=1) or list(PAPER)
        raise ValueError(f"preset paper has no row for env '{env}'; it has {', '.join(near)}.")
    row = PAPER[name]
    return {
        "population_size": row.population,
        "episodes": row.n_eval,
        "rank": row.rank,
        "optimizer": row.optimizer,
        "learning_rate": row.lr,
        "learning_rate_decay": row.lr_decay,
        "sigma": row.sigma,
        "sigma_decay": row.sigma_decay,
        "shaping": "centered_ranks" if row.rank_transform else "z_score",
        "sampled_actions": not row.deterministic,
        "network": "mlp",
        "hidden_sizes": (256, 256, 256),
        "activation": "relu_layer_norm",
    }


# Settings for two cores, found by a few runs of one seed with EGGROLL; experiments/LOG.md has those that failed. Dense
# noise and PPO get the same budget, network and actions; PPO's own settings are the defaults of `experiments.rl.ppo`.
_PAPER_NETWORK: dict[str, Any] = {
    "network": "mlp",
    "hidden_sizes": (256, 256, 256),
    "activation": "relu_layer_norm",
    "population_size": 128,
}
_MPE = _PAPER_NETWORK | {"hidden_sizes": (64, 64, 64), "learning_rate": 0.01}
SMALL: dict[str, dict[str, Any]] = {
    "CartPole-v1": {},
    "Pendulum-v1": _PAPER_NETWORK | {"sigma": 0.05, "learning_rate": 0.01, "env_steps": 2_000_000},
    "navix/Dynamic-Obstacles-6x6-Random-v0": _PAPER_NETWORK
    | {"learning_rate": 0.01, "sampled_actions": True, "env_steps": 500_000},
    "jumanji/Game2048-v1": _PAPER_NETWORK | {"sigma": 0.05, "learning_rate": 0.01},
    "navix/FourRooms-v0": {
        "network": "mlp",
        "hidden_sizes": (64,),
        "population_size": 512,
        "learning_rate": 0.01,
        "sampled_actions": True,
        "normalise": False,
        "env_steps": 4_000_000,
    },
    "jumanji/Knapsack-v1": {
        "hidden_sizes": (),  # a linear policy: deeper ones hardly learn to compare items in this budget
        "population_size": 256,
        "sigma": 0.2,
        "episodes": 4,
        "env_steps": 3_000_000,
    },
    "brax/inverted_double_pendulum": _PAPER_NETWORK | {"sigma": 0.2, "learning_rate": 0.03, "env_steps": 500_000},
    "mpe/simple_spread_v3": _MPE,
    "mpe/simple_speaker_listener_v4": _MPE,
    "mpe/simple_reference_v3": _MPE,
    "kinetix/s/h1_thrust_over_ball": {
        "hidden_sizes": (64, 64),
        "population_size": 128,
        "sigma": 0.2,
        "learning_rate": 0.03,
        "sampled_actions": True,
        "env_steps": 250_000,
    },
}
