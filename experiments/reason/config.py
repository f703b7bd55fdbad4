"""Options of `experiments.reason`, their checks, and the settings of the small models."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

import eggroll
from eggroll.experiments.common.run import jsonable
from eggroll.experiments.reason.grpo import GRPO
from eggroll.experiments.reason.int8 import Int8
from eggroll.experiments.reason.warm_start import Start
from eggroll.llm.decoding import check_sampling

_POSITIVE = ("seeds", "prompts", "samples", "rank", "noise_reuse", "check_every", "validation_size", "test_size", "room")
# What a run may be continued with other values of, because no bit of its parameters depends on it.
_APART: tuple[str, ...] = (
    "seed",
    "seeds",
    "folder",
    "mesh",
    "chunk_size",
    "memory_budget",
    "generations",
    "seconds",
    "resume",
    "plan",
)
_APART += ("prompt_length", "workers", "timeout", "validation_size", "test_size", "examples", "check_every")


@dataclasses.dataclass(frozen=True)
class Config:
    """Improve a language model on verifiable rewards, with forward passes only; or by GRPO, in the same frame."""

    algorithm: Literal["eggroll", "grpo"] = "eggroll"
    """Evolution strategies, or policy gradients by backprop."""
    model: Path | None = None
    """Folder of a Hugging Face checkpoint (Llama, Qwen2, Qwen3, RWKV-7) with its tokenizer.json. None: a small byte-level
    model, warm-started on worked examples of the task."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the parameters of such a checkpoint."""
    weights: Literal["float", "int8"] = "float"
    """Of the matrices of the blocks: floats like all else, or int8 with a scale for every output channel."""
    int8: Int8 = dataclasses.field(default_factory=Int8)
    """How int8 matrices evolve."""
    start: Start = dataclasses.field(default_factory=Start)
    """The small model, where no checkpoint is given."""
    task: str = "arithmetic"
    """A task of envs.tasks: arithmetic, countdown, gsm8k, math, or reasoning_gym/<data set>."""
    task_options: tuple[str, ...] = ()
    """Its options, such as digits=3 train=path."""
    template: str = "{prompt}"
    """What the model reads, with {prompt} where the task's prompt goes, such as "User: {prompt}\\n\\nAssistant: <think";
    \\n is the end of a line. chat: the chat template of the checkpoint's tokenizer."""
    prompt_length: int | None = None
    """Tokens that prompts are padded to. None: what the longest held-out prompt needs and a quarter more."""
    max_new_tokens: int = 24
    """Tokens of a completion at most."""
    stop_token_ids: tuple[int, ...] | None = None
    """Tokens that end a completion. None: those of the checkpoint's generation_config.json; of bytes, the end of a line."""
    temperature: float | None = None
    """Of training's completions. None: 0, greedy; 1 for grpo."""
    top_p: float = 1.0
    """Completions are drawn from the likeliest tokens that reach this probability."""
    population_size: int = 256
    """Members of a generation, even."""
    group: int | None = None
    """Members that get the same prompts, even, dividing the population. None: all."""
    prompts: int = 16
    """Problems that every member answers."""
    samples: int = 1
    """Completions of a problem by a member; more than one needs a temperature."""
    pass_k: int | None = None
    """Fitness is pass@k of a problem's samples. None: their mean."""
    sigma: float = 0.01
    """Standard deviation of the perturbation of a weight."""
    rank: int = 1
    """Rank of the perturbation of a matrix."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """Of the evolution; sgd has the step size of the paper's scale."""
    learning_rate: float = 0.001
    """Step size of the evolution."""
    anchor: float = 0.0
    """Decay of the weights towards where they began, times the step size."""
    shaping: Literal["group_relative", "centered_ranks", "z_score", "pair_sign"] = "group_relative"
    """Of a problem's fitness over the members that answered it; the others are of the whole population."""
    noise_reuse: int = 1
    """Generations that share the same directions."""
    freeze: tuple[str, ...] = ()
    """Patterns of parameter paths that are not evolved, such as "resident/.*"."""
    precision: Literal["master", "stochastic", "nearest"] = "master"
    """How bfloat16 and int8 parameters are updated; metrics.jsonl has the share that moved."""
    grpo: GRPO = dataclasses.field(default_factory=GRPO)
    """Settings of grpo."""
    generations: int | None = None
    """Generations, or steps of grpo. None: as many as fit into `seconds`."""
    seconds: float = 120.0
    """Seconds of training, compilation included, validation not."""
    chunk_size: int | None = None
    """Members evaluated at a time on a device, even."""
    memory_budget: int | None = None
    """Bytes of temporary memory of an evaluation; picks the chunk size."""
    mesh: str | None = None
    """Devices, such as population=4. None: all where the run has several processes, else one."""
    workers: int = 0
    """Processes that score completions; 0: this one, without a time limit."""
    timeout: float = 10.0
    """Seconds that a call of the reward may take in a worker."""
    check_every: int = 10
    """Generations between checks of the unperturbed parameters on validation problems, greedily; each makes a checkpoint."""
    validation_size: int = 128
    """Validation problems of a check at most."""
    test_size: int = 512
    """Test problems at most, before and after training."""
    examples: int = 2
    """Completions that a check shows."""
    seed: int = 0
    """Seed of directions, problems and draws; the same seed gives the same run, but for what the clock decides."""
    seeds: int = 1
    """Runs, with the seeds seed, seed + 1, ...; the summary has their means, and every run under "seeds"."""
    resume: bool = False
    """Go on from what is in the run folder; not for grpo. Otherwise its files are replaced."""
    folder: Path | None = None
    """Run folder, with a folder per seed in it when there are several. None: runs/reason-<algorithm>-<task>-<seed>."""
    plan: bool = False
    """Only print what a population needs of memory, and how many members fit memory_budget, or else what is free here; read
    from shapes alone, without weights."""

    @property
    def known_temperature(self) -> float:
        """The temperature of training's completions."""
        return self.temperature if self.temperature is not None else float(self.algorithm == "grpo")

    @property
    def groups(self) -> int:
        """Groups of members that get the same prompts."""
        return self.population_size // (self.group or self.population_size)

    @property
    def perturbation(self) -> Any:
        """The rules of the noise."""
        quantised = self.int8.rules(sigma=self.sigma, rank=self.rank) if self.weights == "int8" else []
        return [*((pattern, eggroll.Frozen()) for pattern in self.freeze), *quantised, (".*", eggroll.LowRank(self.rank))]

    def given(self) -> dict[str, Any]:
        """The options of the task; ValueError for one that is not name=value."""
        found = {}
        for text in self.task_options:
            name, equals, value = text.partition("=")
            if not equals or not value:
                raise ValueError(f"task_options must be such as digits=3, got {text!r}.")
            try:
                found[name] = json.loads(value)
            except ValueError:
                found[name] = value
        if self.model is None and self.task == "arithmetic":
            found.setdefault("noise", self.start.noise)
        return found

    def options(self) -> dict[str, Any]:
        """The options that decide what a seed gives, as JSON holds them."""
        fields = {name: value for name, value in dataclasses.asdict(self).items() if name not in _APART}
        return jsonable({name: str(value) if isinstance(value, Path) else value for name, value in fields.items()})

    def check(self) -> None:
        """Raise ValueError for what no part below would refuse in one sentence."""
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {getattr(self, name)}.")
        for name in ("seconds", "sigma", "learning_rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a finite number > 0, got {getattr(self, name)}.")
        for name in ("generations", "prompt_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be an integer >= 1 or None, got {value}.")
        check_sampling(max_new_tokens=self.max_new_tokens, temperature=self.known_temperature, top_p=self.top_p)
        if self.samples > 1 and not self.known_temperature:
            raise ValueError(f"samples must be 1 where completions are greedy, got {self.samples}; give a temperature.")
        if self.pass_k is not None and not 1 <= self.pass_k <= self.samples:
            raise ValueError(f"pass_k must be between 1 and samples, {self.samples}, got {self.pass_k}.")
        group = self.group or self.population_size
        if group < 2 or group % 2 or self.population_size % group:
            raise ValueError(
                f"population_size must be a multiple of group, an even number, got {self.population_size} and {group}."
            )
        if self.algorithm == "grpo" and (self.resume or self.mesh or self.pass_k):
            raise ValueError("resume, mesh and pass_k are for eggroll, not for grpo.")
        if self.algorithm == "grpo" and self.weights == "int8":
            raise ValueError("weights int8 are for eggroll, not for grpo: rounding has no gradient.")
        self.start.check()
        self.int8.check()
        self.given()
        if self.algorithm == "grpo":
            self.grpo.check()


def remade(options: dict[str, Any]) -> Config:
    """The configuration of `Config.options()` and a seed, as the journal's header holds it."""
    tuples = {name: tuple(value) for name, value in options.items() if isinstance(value, list)}
    model = {"model": Path(options["model"])} if options["model"] is not None else {}
    parts = {"start": Start(**options["start"]), "grpo": GRPO(**options["grpo"]), "int8": Int8(**options.get("int8", {}))}
    return Config(**options | tuples | model | parts)


def parse(command: Sequence[str] | None) -> Config:
    """Read the command line."""
    return tyro.cli(Config, args=command, prog="python -m experiments.reason")
