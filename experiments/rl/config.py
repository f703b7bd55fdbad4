"""Options of `experiments.rl`, their checks, and the presets that give other defaults."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from eggroll.experiments.common.options import check_integers, check_seeds, ignored_options, only_with, refuse, unless
from eggroll.experiments.common.run import jsonable
from eggroll.experiments.common.schedules import Kind
from eggroll.experiments.rl.ppo import PPO, RULE
from eggroll.experiments.rl.presets import SMALL, paper_settings
from eggroll.update.shaping import SHAPINGS as ALL_SHAPINGS

TARGETS = {"CartPole-v1": 495.0, "Acrobot-v1": -85.0, "Pendulum-v1": -180.0}
SHAPINGS = [name for name in ALL_SHAPINGS if name != "group_relative"]  # every pair has its own episodes: no groups
WITH_END = ("linear", "cosine")  # schedules that need the number of generations
NETWORKS = ("mlp", "cnn", "gru")
EVOLUTION, TRAINED = ("eggroll", "openes"), ("eggroll", "openes", "ppo")
_OF_EVOLUTION = (
    "population_size",
    "generations",
    "sigma",
    "sigma_schedule",
    "sigma_decay",
    "sigma_end",
    "noise_reuse",
    "optimizer",
    "learning_rate",
    "learning_rate_schedule",
    "learning_rate_decay",
    "learning_rate_end",
    "shaping",
    "episodes",
    "chunk_size",
    "mesh",
    "checkpoint_every",
    "on_device",
    "resume",
    "accept_change",
)
_OF_POLICIES = (
    "preset",
    "env_steps",
    "network",
    "hidden_sizes",
    "activation",
    "sampled_actions",
    "normalise",
    "target",
    "checks",
    "render",
)
RULES = (
    only_with("algorithm", ("eggroll",), "rank"),
    only_with("algorithm", EVOLUTION, *_OF_EVOLUTION),
    only_with("algorithm", TRAINED, *_OF_POLICIES),
    only_with("sigma_schedule", ("exponential",), "sigma_decay"),
    only_with("sigma_schedule", WITH_END, "sigma_end"),
    only_with("learning_rate_schedule", ("exponential",), "learning_rate_decay"),
    only_with("learning_rate_schedule", WITH_END, "learning_rate_end"),
    only_with("algorithm", ("ppo",), "ppo"),
    unless(
        lambda config: _own_network(config) and config.algorithm != "ppo",
        "with a --network of your own",
        "hidden_sizes",
        "activation",
    ),
    unless(lambda config: config.mesh is not None, "with --mesh, where generations run one by one", "on_device"),
    unless(lambda config: _has_no_activation(config), "without a hidden layer that has one", "activation"),
    unless(lambda config: not config.resume, "without --resume: a new run has nothing that changed", "accept_change"),
    RULE,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a policy on an environment with evolution strategies or a baseline.

    `--evaluate RUN` and `--render RUN` load a finished run instead; `--evaluate RUN --help` lists their options.
    """

    env: str = "CartPole-v1"
    """Name of an environment: of gymnax, or suite/name, such as brax/ant, or registered by an import."""
    imports: Annotated[tuple[str, ...], tyro.conf.arg(name="import")] = ()
    """Modules or files ending in .py to import first, which register environments by `envs.register`."""
    algorithm: Literal["eggroll", "openes", "ppo", "random"] = "eggroll"
    """Low-rank evolution strategies, dense ones, PPO, or uniformly random actions."""
    preset: Literal["small", "paper"] = "small"
    """Defaults of the options below for this environment: for a small machine, or the EGGROLL paper's."""
    seed: int = 0
    """Seed of the whole run; the same seed gives the same run."""
    seeds: int = 1
    """Runs, with the seeds seed, seed + 1, ...; the summary has their means, and every run under "seeds"."""
    population_size: int = 256
    """Members evaluated per generation, even."""
    env_steps: int = 1_000_000
    """Training stops after the generation (PPO: the update) in which this many environment steps is reached."""
    generations: int | None = None
    """Maximum number of generations (evolution strategies only); None: env_steps alone decides."""
    sigma: float = 0.1
    """Standard deviation of the perturbation of one weight."""
    sigma_schedule: Kind = "exponential"
    """How sigma changes: exponential by sigma_decay, or linear or cosine to sigma_end in the last generation. Without
    generations, that is the last one of env_steps if no episode ends early."""
    sigma_decay: float = 1.0
    """Multiply sigma by this after each generation; 1 keeps it."""
    sigma_end: float = 0.1
    """Sigma of the last generation over that of the first one, of linear and cosine schedules."""
    noise_reuse: int = 1
    """Generations that share the same noise."""
    rank: int = 1
    """Rank of the perturbation of a matrix; openes has none."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """Optimizer of the evolution strategies."""
    learning_rate: float = 0.05
    """Its step size; that of sgd is in the paper's scale (`eggroll.paper_learning_rate`)."""
    learning_rate_schedule: Kind = "exponential"
    """How the step size changes; like sigma_schedule."""
    learning_rate_decay: float = 1.0
    """Multiply the step size by this after each generation; 1 keeps it."""
    learning_rate_end: float = 0.1
    """Step size of the last generation over that of the first one, of linear and cosine schedules."""
    shaping: str = "centered_ranks"
    """Fitness shaping: centered_ranks, z_score or pair_sign."""
    episodes: int = 1
    """Episodes per member; its fitness is their mean return."""
    chunk_size: int | None = None
    """Members evaluated at a time, even. None: all, or as many as fit half of the free memory, which is logged."""
    network: str | None = None
    """The policy: mlp, cnn, gru (recurrent), or module:Class or file.py:Class, a Flax module made with `outputs=n`. None: cnn
    for images, else mlp."""
    hidden_sizes: tuple[int, ...] = (32, 32)
    """Widths of the policy's hidden layers (gru: the last is its memory), and of PPO's value network."""
    activation: Literal["tanh", "relu_layer_norm"] = "tanh"
    """Activation of the hidden layers."""
    sampled_actions: bool = False
    """Sample actions, in training and in evaluation, else take the most likely. PPO always samples in training, and never
    samples continuous actions in evaluation."""
    normalise: bool = True
    """Normalise observations by their running mean and standard deviation."""
    max_steps: int | None = None
    """Number of steps after which episodes are truncated. None: the environment's own."""
    target: float | None = None
    """Stop when the unperturbed parameters reach this mean return in a held-out check. None: without max_steps 495 for
    CartPole-v1, -85 for Acrobot-v1, -180 for Pendulum-v1, and never otherwise; inf: never."""
    checks: int = 20
    """Held-out checks, spread evenly over env_steps."""
    evaluation_episodes: int = 100
    """Episodes of a held-out check, and of the final evaluation, whose episodes are fresh."""
    ppo: PPO = dataclasses.field(default_factory=PPO)
    """Settings of PPO."""
    mesh: str | None = None
    """Devices of evolution strategies, such as population=4. None: all where the run has several processes, else one."""
    checkpoint_every: int = 50
    """Generations between checkpoints; the journal has every generation."""
    on_device: int = 50
    """Generations that run as one program on the device, with the same results: at most this many, and none beyond the first
    that may make a held-out check due. On a mesh 1."""
    resume: bool = False
    """Resume the run in the folder; evolution strategies only. Otherwise its files are replaced."""
    accept_change: bool = False
    """With --resume: continue even if the code of the fitness or of the optimizer has changed."""
    render: bool = False
    """Write one episode of the trained policy as policy.gif; an environment that cannot be drawn is an error before
    training, and a drawing that fails after it a warning."""
    folder: Path | None = None
    """Run folder, with a folder per seed in it when there are several. None: runs/rl-<env>-<algorithm>-<seed>."""

    @property
    def known_target(self) -> float | None:
        """The target, with the defaults of the environments that have one, which are for episodes of their own length."""
        if self.target is None:
            return TARGETS.get(self.env) if self.max_steps is None else None
        return self.target

    def options(self) -> dict[str, Any]:
        """Return the options that determine the result of a seed, for JSON: all but the seeds, the folder and where it runs."""
        apart = (
            "seed",
            "seeds",
            "folder",
            "preset",
            "mesh",
            "checkpoint_every",
            "on_device",
            "resume",
            "accept_change",
            "render",
        )
        options = {name: value for name, value in dataclasses.asdict(self).items() if name not in apart}
        return jsonable(options | {"target": self.known_target})  # null: never, also of infinity

    def ignored(self) -> dict[str, str]:
        """Return the options that are set and have no effect, each with the error that says so."""
        return ignored_options(self, RULES, Config(), preset_defaults(self))

    def check(self) -> None:
        """Raise ValueError for options that have no effect, or that would not get a clear error later."""
        refuse(self.ignored())
        check_seeds(self)
        check_integers(self, "env_steps", "generations", "episodes", "noise_reuse")
        check_integers(self, "checks", "evaluation_episodes", "checkpoint_every", "on_device")
        for name in ("sigma", "learning_rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a finite number > 0, got {getattr(self, name)}.")
        for name in ("sigma_decay", "sigma_end", "learning_rate_decay", "learning_rate_end"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a number > 0 and <= 1, got {getattr(self, name)}.")
        if self.target is not None and not self.target > -math.inf:
            raise ValueError(f"target must be a number, or inf, got {self.target}.")
        if self.shaping not in SHAPINGS:
            raise ValueError(f"shaping must be one of {', '.join(SHAPINGS)}, got {self.shaping!r}.")
        if not (self.network in (None, *NETWORKS) or _own_network(self)):
            known = ", ".join(NETWORKS)
            raise ValueError(f"network must be one of {known}, or module:Class or file.py:Class, got {self.network!r}.")
        if self.network == "gru" and not self.hidden_sizes:
            raise ValueError("hidden_sizes must not be empty with --network gru: its memory has the last one.")
        if any(size < 1 for size in self.hidden_sizes):
            raise ValueError(f"hidden_sizes must be integers >= 1, got {self.hidden_sizes}.")


def _own_network(config: Config) -> bool:
    """Whether the network is a class of the user's: "source:Class"."""
    source, _, name = (config.network or "").rpartition(":")
    return bool(source) and name.isidentifier()


def _has_no_activation(config: Config) -> bool:
    """Whether the network that is named has no dense layer but the last, and a recurrent one of gates."""
    return config.network in ("mlp", "gru") and len(config.hidden_sizes) <= (config.network == "gru")


def restore_config(options: Mapping[str, Any]) -> Config:
    """Make the configuration of a run again, from `Config.options` as JSON keeps them.

    Raises:
        ValueError: an option is missing or unknown: it was stored by another version, or by another experiment.
    """
    try:
        tuples = {name: tuple(options.get(name, ())) for name in ("hidden_sizes", "imports")}
        target = math.inf if options["target"] is None else options["target"]
        changed = {**tuples, "target": target, "ppo": PPO(**options["ppo"])}
        return Config(**{"network": "mlp", **options, **changed})  # before --network all were mlp
    except (KeyError, TypeError) as error:
        raise ValueError(f"the options are not those of experiments.rl in this version: {error}.") from error


def parse(arguments: Sequence[str] | None) -> Config:
    """Read the command line: a preset sets defaults, explicit options take precedence.

    Raises:
        ValueError: the preset has nothing for this environment.
    """
    config = tyro.cli(Config, args=arguments, prog="python -m eggroll.experiments.rl")
    return tyro.cli(Config, args=arguments, default=preset_defaults(config))


def preset_defaults(config: Config) -> Config:
    """Return the defaults of a configuration's preset and environment; ValueError where the preset has none."""
    settings = paper_settings(config.env) if config.preset == "paper" else SMALL.get(config.env, {})
    return dataclasses.replace(Config(), **settings)
