"""Options of `experiments.egg`, their checks, and the presets that give other defaults."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

from eggroll.experiments.common.options import check_integers, check_seeds, ignored_options, refuse, unless
from eggroll.experiments.common.run import jsonable
from eggroll.experiments.egg.models import egg
from eggroll.experiments.egg.models.integer_loss import MAX_TOKENS

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "paper": {"layers": 6, "width": 256, "population_size": 65536, "group": 4096, "generations": 1000, "validation_every": 100},
}
_POSITIVE = ("generations", "alpha_steps", "checkpoint_every", "validation_every", "validation_bytes")
# Options that may change when a run is resumed: its parameters do not depend on them.
_NOT_IDENTITY = {"seed", "seeds", "folder", "preset", "data", "cache", "mesh", "chunk_size", "generations", "resume"}
_NOT_IDENTITY |= {"accept_change"} | {
    "checkpoint_every",
    "validation_every",
    "validation_bytes",
    "sample_length",
    "temperature",
}
RULES = (
    unless(lambda config: not config.resume, "without --resume: a new run has nothing that changed", "accept_change"),
    unless(lambda config: config.sample_length == 0, "with --sample-length 0: no text is drawn", "temperature"),
    unless(
        lambda config: config.alpha_end == config.alpha,
        "with --alpha-end equal to --alpha: the share is constant",
        "alpha_steps",
    ),
    unless(
        lambda config: config.distribution == "rademacher", "with --distribution rademacher: its factors are signs", "update"
    ),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Pretrain EGG, a byte-level recurrent language model in integers, by evolution strategies in integers."""

    preset: Literal["tiny", "paper"] = "tiny"
    """Defaults of the options below: minutes on two cores, or 6 layers 256 wide with 65,536 members in groups of 4,096."""
    data: tuple[Path, ...] = ()
    """Text files and folders. None: the sources of Python's standard library."""
    cache: Path = Path("runs/corpus")
    """Folder for the corpus file."""
    layers: int = 2
    """Layers of the model."""
    width: int = 64
    """Width of the model."""
    rounding: Literal["nearest", "floor"] = "nearest"
    """Rounding of the model: to nearest, or down as in the paper's code."""
    population_size: int = 1024
    """Members evaluated per generation, even."""
    group: int = 64
    """Members that read the same stream of text, even; there are population_size / group streams."""
    bytes_per_update: int = 100
    """Bytes that every member reads and predicts in a generation; its state carries over to the next."""
    generations: int = 150
    """Generations in all."""
    alpha: float = 1.0
    """Share of the weights that move in the first generation if fitness says nothing, in (0, 1]."""
    alpha_end: float = 1 / 16
    """The share after alpha_steps generations: alpha / (1 + (alpha / alpha_end - 1) t / alpha_steps), which keeps falling
    until generation 10,000 or, if later, alpha_steps. The defaults are the paper's 1 / (0.015 t + 1)."""
    alpha_steps: int = 1000
    """Generations until the share is alpha_end."""
    shift: int = 4
    """Sigma is 2^-shift, where weights of 1.0 have the size of initial ones; 0 to 16."""
    rank: int = 1
    """Rank of the perturbation of a matrix."""
    distribution: Literal["normal", "rademacher"] = "normal"
    """Distribution of the factors."""
    update: Literal["value", "sign"] = "value"
    """What the update sums: the factors, or their signs."""
    shaping: Literal["pair_sign", "z_score"] = "z_score"
    """Fitness of a pair: which member is better, as in the paper, or by how much, which learns faster."""
    chunk_size: int | None = 1024
    """Members evaluated at a time on a device, even. None: all."""
    mesh: str | None = None
    """Devices, such as population=4. None: all where the run has several processes, else one."""
    seed: int = 0
    """Seed of the whole run; the same seed gives the same run on any number of devices."""
    seeds: int = 1
    """Runs, with the seeds seed, seed + 1, ...; the summary has their means, and every run under "seeds"."""
    validation_every: int = 50
    """Generations between checks of the unperturbed parameters on held-out text; there is one at the end."""
    validation_bytes: int = 2_000_000
    """Held-out bytes of a check at most: 1,024 streams of contiguous text, fewer of a short one, each from a fresh state."""
    sample_length: int = 200
    """Bytes of text drawn from the model at every check; 0: none."""
    temperature: float = 0.7
    """Temperature of that text."""
    checkpoint_every: int = 50
    """Generations between checkpoints; later generations are evaluated again when a run resumes."""
    resume: bool = False
    """Resume the run in the folder. Otherwise its files are replaced."""
    accept_change: bool = False
    """With --resume: continue even if the code of the fitness or of the optimizer has changed."""
    folder: Path | None = None
    """Run folder, with a folder per seed in it when there are several. None: runs/egg-<layers>x<width>-<population>-<seed>."""

    @property
    def model(self) -> egg.Config:
        """Shape of the model."""
        return egg.Config(self.layers, self.width, self.rounding)

    @property
    def streams(self) -> int:
        """Streams of training text."""
        return self.population_size // self.group

    def alpha_of(self, generation: int) -> float:
        """Share of the weights that move in a generation if fitness says nothing."""
        return self.alpha / (1 + (self.alpha / self.alpha_end - 1) * generation / self.alpha_steps)

    def options(self) -> dict[str, Any]:
        """Return the options that determine the result of a seed, for JSON."""
        return jsonable({name: value for name, value in dataclasses.asdict(self).items() if name not in _NOT_IDENTITY})

    def check(self) -> None:
        """Raise ValueError for options that have no effect, or that would not get a clear error later."""
        refuse(ignored_options(self, RULES, Config(), preset_defaults(self)))
        check_seeds(self)
        check_integers(self, *_POSITIVE)
        for name in ("alpha", "alpha_end"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)}.")
        if self.alpha_end > self.alpha:
            raise ValueError(f"alpha_end must be at most alpha, {self.alpha}, got {self.alpha_end}.")
        if self.group < 2 or self.group % 2 or self.population_size % self.group:
            raise ValueError(
                f"population_size must be a multiple of group, an even number, got {self.population_size} and {self.group}."
            )
        if not 1 <= self.bytes_per_update <= MAX_TOKENS:
            raise ValueError(f"bytes_per_update must be from 1 to {MAX_TOKENS}, got {self.bytes_per_update}.")
        if self.sample_length < 0 or not self.temperature >= 0:
            raise ValueError(f"sample_length and temperature must be >= 0, got {self.sample_length} and {self.temperature}.")
        _ = self.model  # checks its shape


def parse(arguments: Sequence[str] | None) -> Config:
    """Read the command line: a preset sets defaults, explicit options take precedence."""
    config = tyro.cli(Config, args=arguments, prog="python -m eggroll.experiments.egg")
    return tyro.cli(Config, args=arguments, default=preset_defaults(config))


def preset_defaults(config: Config) -> Config:
    """Return the defaults of a configuration's preset."""
    return dataclasses.replace(Config(), **PRESETS[config.preset])
