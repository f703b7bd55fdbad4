"""Options of `experiments.reason` and their checks."""

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

from eggroll.experiments.common.options import (
    check_choices,
    check_integers,
    check_seeds,
    ignored_options,
    refuse,
    replace_options,
)
from eggroll.experiments.common.run import jsonable
from eggroll.experiments.reason.contents import read_contents
from eggroll.experiments.reason.effects import NOT_IDENTITY, RULES, WORKED_TASK
from eggroll.experiments.reason.grpo import GRPO
from eggroll.experiments.reason.int8 import Int8
from eggroll.experiments.reason.presets import PRESETS
from eggroll.experiments.reason.warm_start import WarmStart
from eggroll.llm.decoding import check_sampling

_POSITIVE = (
    "prompts",
    "samples",
    "rank",
    "noise_reuse",
    "check_every",
    "validation_size",
    "test_size",
    "max_new_tokens",
    "generations",
    "prompt_length",
)
_RENAMED = {"room": "max_new_tokens", "ending": "stop_token_ids"}  # options of older commands and journals


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a language model on verifiable rewards, with forward passes only, or by GRPO for comparison."""

    preset: Literal["small", "smollm2-sums", "smollm2-chain", "smollm2-countdown"] = "small"
    """Defaults of the other options: SmolLM2-135M on two-digit sums, on chain_sum of reasoning-gym with two numbers, or on
    countdown with two numbers."""
    algorithm: Literal["eggroll", "grpo"] = "eggroll"
    """Evolution strategies, or policy gradients by backprop."""
    model: Path | None = None
    """Folder of a Hugging Face checkpoint (Llama, Qwen2, Qwen3, RWKV-7) with its tokenizer.json; or smollm2, which comes from
    the package registry. None: a small byte-level model, warm-started on worked examples of the task."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the parameters of a checkpoint."""
    weights: Literal["float", "int8"] = "float"
    """Type of the matrices in the blocks: floats, or int8 with a scale for every output channel."""
    int8: Int8 = dataclasses.field(default_factory=Int8)
    """How int8 matrices evolve."""
    start: WarmStart = dataclasses.field(default_factory=WarmStart)
    """The small model and its training, without --model."""
    task: str = "arithmetic"
    """A task of envs.tasks: arithmetic, countdown, short_countdown, gsm8k, math, or reasoning_gym/<data set>."""
    task_options: tuple[str, ...] = ()
    """Options of the task, such as digits=3 train=path."""
    data: Path | None = None
    """Your own problems instead of a task: a JSONL file of objects with a prompt and columns for the reward."""
    prompt_column: str | None = None
    """Column of data with the prompt. None: prompt."""
    key_column: str | None = None
    """Column of data whose equal values stay in one split. None: that of the prompt."""
    reward: tuple[str, ...] | None = None
    """Reward of data, or instead of the task's: FILE.py:FUNCTION, MODULE:FUNCTION, last_number, math_verify or think_answer;
    the sum of several, each with a weight such as score.py:short=0.1. None: the task's."""
    template: str = "{prompt}"
    """What the model reads, with {prompt} where the task's prompt goes, such as "User: {prompt}\\n\\nAssistant: <think";
    \\n is the end of a line. chat: the chat template of the checkpoint's tokenizer."""
    prompt_length: int | None = None
    """Most tokens of a prompt, to which all are padded. None: what the prompts of a batch need, in few different lengths."""
    max_new_tokens: int = 24
    """Most tokens of a completion."""
    stop: tuple[str, ...] | None = None
    """Texts that end a completion, such as "\\n" or "Question:", besides the checkpoint's eos_token_id. One of several tokens,
    or within another token, cuts the text once it is whole, which takes until max_new_tokens. None: no others; for bytes the
    end of a line."""
    stop_token_ids: tuple[int, ...] | None = None
    """Ids of the only stop tokens, instead of stop and eos_token_id. None: eos_token_id in generation_config.json."""
    temperature: float | None = None
    """Temperature of the completions in training. None: 0, greedy; 1 for grpo."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together reach this probability."""
    population_size: int = 256
    """Members of a generation, even."""
    group: int | None = None
    """Members that get the same prompts, even, dividing the population. None: all."""
    prompts: int = 16
    """Problems that every member answers in a generation."""
    samples: int = 1
    """Completions of a problem by a member; more than one needs a temperature."""
    pass_k: int | None = None
    """Fitness of a problem is pass@k of its samples, of which those that score at least 1 are right. None: their mean."""
    sigma: float = 0.01
    """Standard deviation of the perturbation of a weight."""
    rank: int = 1
    """Rank of the perturbation of a matrix."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """Optimizer of the evolution; sgd uses the step size of the paper."""
    learning_rate: float = 0.001
    """Step size of the evolution."""
    anchor: float = 0.0
    """Decay of the weights towards their initial values, times the step size; of int8 matrices, times their own."""
    shaping: Literal["group_relative", "centered_ranks", "z_score", "pair_sign"] = "group_relative"
    """Fitness shaping: group_relative compares members that answered the same problem, the others the whole population."""
    noise_reuse: int = 1
    """Generations that share the same directions."""
    freeze: tuple[str, ...] = ()
    """Patterns of parameter paths to keep fixed, such as "resident/.*"."""
    precision: Literal["master", "stochastic", "nearest", "feedback"] = "master"
    """How bfloat16 and int8 parameters are updated; metrics.jsonl reports the share that moved. feedback is for int8 matrices
    and --int8.optimizer sgd: the rounding errors of a window of steps are rebuilt from their coefficients."""
    grpo: GRPO = dataclasses.field(default_factory=GRPO)
    """Settings of grpo."""
    generations: int | None = None
    """Generations, or steps of grpo. None: as many as fit into `seconds`."""
    seconds: float | None = None
    """Seconds of training, compilation included, validation not; with generations, whichever comes first. None: 120, or no
    limit with generations."""
    clock: Literal["wall", "processor"] = "wall"
    """What `seconds` counts: time that passes, or processor time of this process, for a machine with other work."""
    chunk_size: int | None = None
    """Members evaluated at a time on a device, even."""
    memory_budget: int | None = None
    """Bytes of temporary memory for an evaluation; determines the chunk size, in place of chunk_size."""
    mesh: str | None = None
    """Devices, such as population=4. None: all devices of a run of several processes, otherwise one."""
    workers: int = 0
    """Processes that score completions; 0: this one, without a time limit."""
    timeout: float = 10.0
    """Time limit for a call of the reward in a worker, in seconds."""
    reward_minimum: float | None = None
    """Score of a completion whose reward fails, unless another of the generation scores lower: then that. None: 0."""
    check_every: int = 10
    """Generations between checkpoints, which also check the unperturbed parameters on validation problems, greedily."""
    validation_size: int = 128
    """Most validation problems of a check."""
    test_size: int = 512
    """Most test problems, before and after training."""
    examples: int = 2
    """Completions that a check prints."""
    seed: int = 0
    """Seed of noise, problems and sampling; the same seed gives the same run, except where the clock decides."""
    seeds: int = 1
    """Number of runs, with the seeds seed, seed + 1, ...; the summary has their means, and every run under "seeds"."""
    resume: bool = False
    """Continue the run in the folder. Otherwise its files are replaced."""
    accept_change: bool = False
    """With --resume: continue even if the code of the fitness or of the optimizer has changed."""
    folder: Path | None = None
    """Run folder, which contains a folder per seed if there are several. None: runs/reason-<algorithm>-<task>-<seed>."""
    plan: bool = False
    """Only print the memory of a population and how many members fit memory_budget, by default the free memory of a device;
    read from shapes alone, without weights. Options of the training that it does not need are accepted, as in a dry run."""
    probe: bool = False
    """Only measure, in a minute or `seconds`, what members at several sigmas and steps of several sizes do, and recommend
    values. Options of the training that it does not need are accepted, and nothing is written."""

    @property
    def sampling_temperature(self) -> float:
        """The temperature of the completions in training."""
        return self.temperature if self.temperature is not None else float(self.algorithm == "grpo")

    @property
    def task_name(self) -> str:
        """The name of the task, or of the user's data."""
        return self.task if self.data is None else self.data.stem

    @property
    def time_limit(self) -> float:
        """Seconds of training; infinite where only generations limit a run."""
        return self.seconds or (120.0 if self.generations is None else math.inf)

    @property
    def budget(self) -> tuple[str, float] | None:
        """The time limit as `eggroll.train` takes it."""
        return None if math.isinf(self.time_limit) else ("seconds_spent", self.time_limit)

    @property
    def limits(self) -> dict[str, Any]:
        """What ends a run, for its summary."""
        clock = {} if self.clock == "wall" else {"clock": self.clock}
        return {"generations": self.generations, "seconds": self.seconds} | clock

    @property
    def groups(self) -> int:
        """Number of groups of members that get the same prompts."""
        return self.population_size // (self.group or self.population_size)

    def parsed_task_options(self) -> dict[str, Any]:
        """Return the options of the task; ValueError for one that is not name=value."""
        found = {}
        for text in self.task_options:
            name, equals, value = text.partition("=")
            if not equals or not value:
                raise ValueError(f"task_options must be such as digits=3, got {text!r}.")
            try:
                found[name] = json.loads(value)
            except ValueError:
                found[name] = value
        if self.model is None and self.task == WORKED_TASK:
            found.setdefault("noise", self.start.noise)
        return found

    def options(self) -> dict[str, Any]:
        """Return the options that decide the result of a seed, as JSON values."""
        fields = {name: value for name, value in dataclasses.asdict(self).items() if name not in NOT_IDENTITY}
        del fields["grpo"]["microbatches"]  # the same step in less memory
        if self.clock != "wall":
            fields["clock"] = self.clock  # the seconds that a run has spent are its own
        fields["contents"] = read_contents(self.data, self.reward)
        return jsonable({name: str(value) if isinstance(value, Path) else value for name, value in fields.items()})

    def ignored(self) -> dict[str, str]:
        """Return the options that are set and have no effect, each with the error that says so."""
        return ignored_options(self, RULES, Config(), preset_defaults(self.preset))

    def check(self) -> None:
        """Raise ValueError for options that have no effect, are out of range or contradict each other."""
        check_choices(self)
        refuse(self.ignored())
        check_seeds(self)
        check_integers(self, *_POSITIVE)
        check_integers(self, "examples", least=0)
        for name in ("seconds", "sigma", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a finite number > 0, got {value}.")
        if self.reward_minimum is not None and not abs(self.reward_minimum) < float("inf"):
            raise ValueError(f"reward_minimum must be a finite number or None, got {self.reward_minimum}.")
        check_sampling(max_new_tokens=self.max_new_tokens, temperature=self.sampling_temperature, top_p=self.top_p)
        if self.stop is not None and self.stop_token_ids is not None:
            raise ValueError(f"give stop or stop_token_ids, not both; got {self.stop} and {self.stop_token_ids}.")
        if self.samples > 1 and not self.sampling_temperature:
            raise ValueError(f"samples must be 1 for greedy completions, got {self.samples}; give a temperature.")
        if self.pass_k is not None and not 1 <= self.pass_k <= self.samples:
            raise ValueError(f"pass_k must be between 1 and samples, {self.samples}, got {self.pass_k}.")
        group = self.group or self.population_size
        if group < 2 or group % 2 or self.population_size % group:
            raise ValueError(
                f"population_size must be a multiple of group, an even number, got {self.population_size} and {group}."
            )
        if self.plan and self.probe:
            raise ValueError("give plan or probe, not both: a plan reads no weights.")
        if self.precision == "feedback" and (self.weights, self.int8.optimizer) != ("int8", "sgd"):
            raise ValueError("precision feedback rebuilds the steps of int8 matrices: add --weights int8 --int8.optimizer sgd.")
        if self.anchor and self.weights == "int8" and (self.precision == "feedback" or self.int8.threshold is not None):
            raise ValueError("anchor must be 0 with weights int8 that --precision feedback or --int8.threshold move.")
        if self.algorithm == "grpo" and self.weights == "int8":
            raise ValueError("weights int8 are for eggroll, not for grpo: rounding has no gradient.")
        self.start.check()
        self.int8.check()
        if self.model is not None and self.task == WORKED_TASK and "noise" in self.parsed_task_options():
            raise ValueError("--task-options noise has no effect with --model: only a warm start reads worked examples.")
        if self.algorithm == "grpo":
            self.grpo.check()


def restore_config(options: dict[str, Any]) -> Config:
    """Return the configuration of `Config.options()` and a seed, as a journal's header has them."""
    options = {_RENAMED.get(name, name): value for name, value in options.items() if name != "contents"}
    tuples = {name: tuple(value) for name, value in options.items() if isinstance(value, list)}
    paths = {name: Path(options[name]) for name in ("model", "data") if options.get(name) is not None}
    parts = {"start": WarmStart(**options["start"]), "grpo": GRPO(**options["grpo"]), "int8": Int8(**options.get("int8", {}))}
    return Config(**options | tuples | paths | parts)


def parse(command: Sequence[str] | None) -> Config:
    """Read the command line: a preset sets defaults, explicit options take precedence; wrong options end the program."""
    for argument in sys.argv[1:] if command is None else command:
        option = argument.partition("=")[0].removeprefix("--")
        if argument.startswith("--") and option in _RENAMED:
            sys.exit(f"error: option --{option} is now --{_RENAMED[option].replace('_', '-')}.")
    prog = "python -m eggroll.experiments.reason"
    preset = tyro.cli(Config, args=command, prog=prog).preset
    return tyro.cli(Config, args=command, prog=prog, default=preset_defaults(preset))


def preset_defaults(preset: str) -> Config:
    """Return the configuration that explicit options change."""
    return replace_options(Config(preset=preset), PRESETS[preset])  # type: ignore[arg-type]
