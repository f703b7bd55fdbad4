"""Options of `experiments.rl`, their checks, and the presets that give other defaults."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

from eggroll.shaping import SHAPINGS
from experiments.baselines.ppo import PPO
from experiments.presets import paper_settings

TARGETS = {"CartPole-v1": 495.0, "Acrobot-v1": -85.0, "Pendulum-v1": -180.0}


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a policy on an environment with evolution strategies or a baseline."""

    env: str = "CartPole-v1"
    """Name of an environment: of gymnax, or suite/name, such as brax/ant."""
    algorithm: Literal["eggroll", "openes", "ppo", "random"] = "eggroll"
    """Low-rank evolution strategies, dense ones, PPO, or uniformly random actions."""
    preset: Literal["small", "paper"] = "small"
    """Defaults of the options below: for a small machine, or the EGGROLL paper's for this environment."""
    seed: int = 0
    """Seed of the whole run; the same seed gives the same run."""
    seeds: int = 1
    """Runs, with the seeds seed, seed + 1, ...; the summary has their means, and every run under "seeds"."""
    population_size: int = 256
    """Members evaluated per generation, even."""
    generations: int = 200
    """Generations at most."""
    env_steps: int | None = None
    """Stop after so many environment steps of training. None: never; 500,000 for PPO, which needs a number."""
    sigma: float = 0.1
    """Standard deviation of the perturbation of one weight."""
    sigma_decay: float = 1.0
    """Factor of sigma per generation."""
    rank: int = 1
    """Rank of the perturbation of a matrix; openes has none."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """Optimizer of the evolution strategies."""
    learning_rate: float = 0.05
    """Its step size; that of sgd is in the paper's scale (`eggroll.paper_learning_rate`)."""
    learning_rate_decay: float = 1.0
    """Factor of the step size per generation."""
    shaping: str = "centered_ranks"
    """Fitness shaping: centered_ranks, z_score, group_relative or pair_sign."""
    episodes: int = 1
    """Episodes per member; its fitness is their mean return."""
    chunk_size: int | None = None
    """Members evaluated at a time, even. None: all."""
    hidden_sizes: tuple[int, ...] = (32, 32)
    """Widths of the policy's hidden layers, and of PPO's value network."""
    activation: Literal["tanh", "relu_layer_norm"] = "tanh"
    """Activation of the hidden layers."""
    sampled_actions: bool = False
    """Sample actions in training; evaluation takes the most likely action in any case. PPO always samples."""
    normalise: bool = True
    """Normalise observations by their running mean and standard deviation."""
    max_steps: int | None = None
    """Truncate episodes after so many steps. None: as the environment has it."""
    target: float | None = None
    """Stop when the unperturbed parameters reach this mean return in a held-out check. None: 495 for CartPole-v1, -85 for
    Acrobot-v1, -180 for Pendulum-v1, never for others. PPO has no such check."""
    check_every: int = 5
    """Generations between held-out checks."""
    evaluation_episodes: int = 100
    """Episodes of a held-out check, and of the final evaluation, whose episodes are fresh."""
    ppo: PPO = dataclasses.field(default_factory=PPO)
    """Settings of PPO."""
    folder: Path | None = None
    """Run folder, with a folder per seed in it when there are several; its files are replaced. None:
    runs/rl-<env>-<algorithm>-<seed>."""

    @property
    def known_target(self) -> float | None:
        """The target, with the defaults of the environments that have one."""
        return TARGETS.get(self.env) if self.target is None else self.target

    def check(self) -> None:
        """Raise ValueError for what no part below would refuse in one sentence."""
        for name in ("seeds", "generations", "episodes", "check_every", "evaluation_episodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {getattr(self, name)}.")
        if self.env_steps is not None and self.env_steps < 1:
            raise ValueError(f"env_steps must be an integer >= 1, got {self.env_steps}.")
        for name in ("sigma", "learning_rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a finite number > 0, got {getattr(self, name)}.")
        for name in ("sigma_decay", "learning_rate_decay"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a number > 0 and <= 1, got {getattr(self, name)}.")
        if self.shaping not in SHAPINGS:
            raise ValueError(f"shaping must be one of {', '.join(SHAPINGS)}, got {self.shaping!r}.")
        if any(size < 1 for size in self.hidden_sizes):
            raise ValueError(f"hidden_sizes must be integers >= 1, got {self.hidden_sizes}.")


def parse(arguments: Sequence[str] | None) -> Config:
    """Read the command line: a preset gives defaults, options given beside it win.

    Raises:
        ValueError: the preset has nothing for this environment.
    """
    config = tyro.cli(Config, args=arguments, prog="python -m experiments.rl")
    if config.preset == "small":
        return config
    return tyro.cli(Config, args=arguments, default=dataclasses.replace(Config(), **paper_settings(config.env)))
