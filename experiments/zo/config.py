"""Options of `experiments.zo`, their checks, and the settings of the recipes on the small model."""

import dataclasses
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

from eggroll import zo
from eggroll.experiments.common.options import check_integers, check_seeds, ignored_options, only_with, refuse, unless
from eggroll.experiments.common.run import jsonable
from eggroll.experiments.zo.data import sentiment
from eggroll.experiments.zo.data.tasks import RTE, SST2, Classification, Generation, Task
from eggroll.experiments.zo.warm_start import RULE, WarmStart

BACKPROP = "adam"
MEZO_NOISE = "rademacher"  # of `zo.mezo` unless it is given
RECIPES = (*zo.RECIPES, BACKPROP)
TASKS: dict[str, Classification] = {"sentiment": sentiment.TASK, "sst2": SST2, "rte": RTE}
BYTES = Classification("{text}:", {"0": "-", "1": "+"})  # sentiment for the small model, which reads bytes
OWN = ("learning_rate", "sigma", "directions", "weight_decay")  # arguments of a recipe that are options of their own
_DENSE = ("mezo", "adamezo", "fzoo", "spsa15")  # recipes whose noise can be of low rank, too
_OF_RECIPES = (
    "sigma",
    "directions",
    "options",
    "perturbation",
    "weight_decay",
    "chunk_directions",
    "offload",
    "precision",
    "mesh",
    "checkpoint_every",
    "resume",
    "accept_change",
    "guidance",
    "probe",
)
_LIMITS = ("steps", "forwards", "checks")  # a run may be resumed with others
_APART = ("seed", "seeds", "folder", "mesh", "checkpoint_every", "resume", "accept_change", "guidance", "evaluate", "probe")
_OWN_TASK = "with --label-words or --answer, which make a task of their own"
RULES = (
    only_with("recipe", tuple(zo.RECIPES), *_OF_RECIPES),
    unless(
        lambda config: config.perturbation == "lowrank" and config.recipe not in _DENSE,
        "as lowrank with a recipe whose noise has a form of its own",
        "perturbation",
    ),
    unless(lambda config: config.model is None or config.dtype == "float32", "without --dtype bfloat16", "precision"),
    unless(lambda config: config.offload, "with --offload, whose short floats are rounded stochastically", "precision"),
    unless(lambda config: not config.offload, "without --offload: it is of blocks in the host's memory", "transfer_dtype"),
    unless(lambda config: config.probe, "with --probe, which measures in any case", "guidance"),
    unless(lambda config: not config.resume, "without --resume: a new run has nothing that changed", "accept_change"),
    unless(lambda config: config.model is None, "without --model: the small model has float32 parameters", "dtype"),
    unless(lambda config: config.model is not None, "with --model: it is of the small model", "start"),
    unless(
        lambda config: config.steps is not None,
        "with --steps, which says how long training takes; give one of them",
        "forwards",
    ),
    unless(lambda config: bool(config.label_words) or config.answer is not None, _OWN_TASK, "task"),
    RULE,
)

# Chosen on validation examples with seed 100, which no table uses (experiments/RESULTS.md).
SMALL: dict[str, dict[str, Any]] = {
    "mezo": {"learning_rate": 1e-3, "sigma": 1e-3},
    "adamezo": {"learning_rate": 1e-3, "sigma": 1e-3},
    "lozo": {"learning_rate": 1e-3, "sigma": 1e-3, "chunk_directions": None},
    "lozo_m": {"learning_rate": 1e-3, "sigma": 1e-3, "chunk_directions": None},
    "fzoo": {"learning_rate": 5e-3, "sigma": 1e-3},
    "spsa15": {"learning_rate": 1e-2, "sigma": 1e-3, "directions": 8},
    "grzo": {"learning_rate": 3e-5, "sigma": 1e-3},
    BACKPROP: {"learning_rate": 3e-3},
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Fine-tune a language model on a task with forward passes only, or by backprop."""

    recipe: str = "mezo"
    """A recipe of zo: mezo, adamezo, lozo, lozo_m, fzoo, spsa15 or grzo; or adam: backprop on the same loss."""
    model: Path | None = None
    """Folder of a Hugging Face checkpoint (OPT, Llama, Qwen2, Qwen3) with its tokenizer.json; or smollm2, which comes from the
    package registry. None: a small byte-level model, trained briefly on the text of Python's standard library."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the parameters of such a checkpoint."""
    start: WarmStart = dataclasses.field(default_factory=WarmStart)
    """The small model, where no checkpoint is given."""
    data: Path | None = None
    """Folder with train.jsonl, validation.jsonl and test.jsonl, or one file, of which 80, 10 and 10 % become these. None: the
    sentiment task, written to the run folder; the small model gets its short sentences."""
    task: str = "sentiment"
    """What the records are: sentiment, sst2 or rte; the options below make another task. Of the small model, which reads bytes,
    sentiment wants one byte, "+" or "-"."""
    template: str | None = None
    """Prompt with the record's fields in braces, such as "{text} It was"."""
    label_words: dict[str, str] = dataclasses.field(default_factory=dict)
    """Labels and their words, each with the space that it starts with: 0 " terrible" 1 " great"."""
    answer: str | None = None
    """For generation: the answer with the record's fields in braces, such as " {answer}</s>"."""
    max_length: int = 256
    """Most tokens of an example; a longer prompt loses its beginning."""
    objective: str = "loss"
    """What is improved: loss, or accuracy, which has no gradient."""
    seed: int = 0
    """Seed of directions and batches; the same seed gives the same run."""
    seeds: int = 1
    """Runs, with the seeds seed, seed + 1, ...; the summary has their means, and every run under "seeds"."""
    forwards: int = 40_000
    """Forward passes of a batch that training may take, without --steps. A step of adam counts one; its backward pass is not
    counted."""
    steps: int | None = None
    """Steps, those before a resume included. None: as many as `forwards` allows."""
    batch_size: int = 16
    """Examples in a batch."""
    directions: int | None = None
    """Directions a step. None: the recipe's default."""
    sigma: float | None = None
    """Standard deviation of the perturbation of a weight. None: the small model's, or the recipe's default."""
    perturbation: Literal["normal", "rademacher", "lowrank"] | None = None
    """Noise of the directions: of that distribution in the form of the recipe, or of rank 2. None: the recipe's default."""
    learning_rate: float | None = None
    """Step size. None: the small model's, or the recipe's default; --probe measures one."""
    weight_decay: float = 0.0
    """Decoupled weight decay; biases and normalisation are exempt."""
    options: tuple[str, ...] = ()
    """Further arguments of the recipe, such as rank=4 refresh=100."""
    chunk_directions: int | None = 1
    """Directions evaluated at a time; None: all. Dense noise holds a copy of the parameters for each."""
    offload: bool = False
    """Keep the blocks in the host's memory, and one at a time on the device."""
    precision: Literal["master", "stochastic", "nearest"] | None = None
    """How bfloat16 parameters are updated: with float32 copies (6 bytes a parameter instead of 2), or rounded. None: master."""
    transfer_dtype: Literal["bfloat16", "float16"] | None = None
    """Type of float32 blocks in the host's memory and on their way, rounded stochastically. None: unchanged."""
    mesh: str | None = None
    """Devices, such as population=2,data=2. None: all along population where the run has several processes, else one."""
    checks: int = 20
    """Scores of the unperturbed parameters on the validation examples while training, spread evenly."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; the journal has every step."""
    guidance: bool = True
    """Before the first step, measure projected gradient and curvature on two batches and print the learning rate that they
    suggest; it takes 34 forwards, on some meshes more, that no budget counts."""
    resume: bool = False
    """Resume the run in the folder, with more --steps or --forwards to extend it; not for adam. Otherwise its files are
    replaced."""
    accept_change: bool = False
    """With --resume: continue even if the code of the loss or of the optimizer, or a file of --data, has changed."""
    folder: Path | None = None
    """Run folder, with a folder per seed in it when there are several. None: runs/zo-<recipe>-<seed>."""
    evaluate: bool = False
    """Only score: the model; or, given the folder of a finished run, its last and its best parameters on its own task. Nothing
    is tuned, but the small model is made once, in runs/zo-start. Options of the training are accepted, next to a folder those
    of its run."""
    probe: bool = False
    """Only measure what guidance does, and print the learning rate. Nothing is tuned, but the small model is made once, in
    runs/zo-start. Options of the training are accepted."""

    @property
    def language_task(self) -> Task:
        """The task that the options name."""
        if self.label_words and self.answer is not None:
            raise ValueError("label_words make a classification and answer a generation; give one of them.")
        if self.answer is not None:
            return Generation(self.template or Generation.template, self.answer)
        if self.label_words:
            if self.template is None:
                raise ValueError("label_words need a template, such as '{text} It was'.")
            return Classification(self.template, self.label_words)
        known = BYTES if self.task == "sentiment" and self.model is None else TASKS[self.task]
        return known if self.template is None else dataclasses.replace(known, template=self.template)

    def given(self) -> dict[str, Any]:
        """Return the arguments of the recipe that `options` sets.

        Raises:
            ValueError: not name=value, or nothing that the recipe has.
        """
        has = [name for name in arguments(self.recipe) if name not in (*OWN, "perturbation", "distribution", "adam")]
        found = {}
        for text in self.options:
            name, equals, value = text.partition("=")
            if not equals or not value:
                raise ValueError(f"options must be such as rank=4, got {text!r}.")
            if name not in has:
                raise ValueError(f"options: recipe {self.recipe} has no {name!r}, it has {', '.join(has) or 'none'}.")
            try:
                found[name] = json.loads(value)
            except ValueError:
                found[name] = value
        return found

    def settings(self) -> dict[str, Any]:
        """Return the options that determine the result of a seed, for JSON: all but the seeds, the folder and where it runs."""
        fields = {name: value for name, value in dataclasses.asdict(self).items() if name not in _APART}
        if (self.recipe, self.perturbation) == ("mezo", None):
            fields["perturbation"] = MEZO_NOISE  # None in a run stands for normal noise, the default before
        return jsonable({name: str(value) if isinstance(value, Path) else value for name, value in fields.items()})

    def identity(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings that a run must share with the `stored` ones that it resumes, if any: not its length."""
        settings = self.settings() | {name: stored.get(name) for name in _LIMITS}
        if stored and _noise_of(stored) == settings["perturbation"]:
            settings["perturbation"] = stored.get("perturbation")
        return settings

    def ignored(self) -> dict[str, str]:
        """Return the options that are set and have no effect, each with the error that says so."""
        return ignored_options(self, RULES, Config(), small_defaults(self))

    def check(self) -> None:
        """Raise ValueError for options that have no effect, or that would not get a clear error later."""
        for name, among in (("recipe", RECIPES), ("task", tuple(TASKS)), ("objective", ("loss", "accuracy"))):
            if getattr(self, name) not in among:
                raise ValueError(f"{name} must be one of {', '.join(among)}, got {getattr(self, name)!r}.")
        refuse(self.ignored())
        check_seeds(self)
        check_integers(self, "forwards", "steps", "batch_size", "directions", "checks", "checkpoint_every", "max_length")
        for name in ("sigma", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a finite number > 0, got {value}.")
        self.start.check()
        _ = self.language_task
        if self.recipe != BACKPROP:
            self.given()
        elif self.objective != "loss":
            raise ValueError(f"objective {self.objective} has no gradient: adam needs the objective loss.")
        if self.evaluate and self.probe:
            raise ValueError("give evaluate or probe, not both.")
        needed = arguments(self.recipe).get("learning_rate") is inspect.Parameter.empty and not (self.evaluate or self.probe)
        if needed and self.learning_rate is None:
            known = "" if self.recipe == BACKPROP else "; --probe measures one"
            raise ValueError(f"learning_rate must be given: none is known for {self.recipe} on this model{known}.")


def _noise_of(stored: Mapping[str, Any]) -> str | None:
    """The noise of a run with the given settings."""
    noise = stored.get("perturbation")
    return "normal" if (stored.get("recipe"), noise) == ("mezo", None) else noise


def config_from(settings: dict[str, Any]) -> Config:
    """Return the configuration with the given `Config.settings()`, and contents, as stored in the header of a journal.

    Raises:
        ValueError: an option is missing or unknown: it was stored by another version, or by another experiment.
    """
    try:
        paths = {name: Path(settings[name]) for name in ("model", "data") if settings[name] is not None}
        changed = {"start": WarmStart(**settings["start"]), "options": tuple(settings["options"])}
        known = {name: value for name, value in settings.items() if name != "contents"}  # of the data, compared by the caller
        return Config(**known | {"perturbation": _noise_of(settings)} | paths | changed)
    except (KeyError, TypeError) as error:
        raise ValueError(f"the options are not those of experiments.zo in this version: {error}.") from error


def arguments(recipe: str) -> dict[str, Any]:
    """Return the arguments of a recipe by name, each with its default, `inspect.Parameter.empty` where it has none."""
    if recipe == BACKPROP:
        return {"learning_rate": inspect.Parameter.empty}
    found: dict[str, Any] = {}
    between = (zo.lozo,) if recipe == "lozo_m" else ()
    for make in (zo.mezo, *between, zo.RECIPES[recipe]):  # recipes hand on what they do not name
        kinds = inspect.signature(make).parameters.values()
        found |= {kind.name: kind.default for kind in kinds if kind.kind is inspect.Parameter.KEYWORD_ONLY}
    return found


def parse(command: Sequence[str] | None) -> Config:
    """Read the command line: the small model's settings of a recipe are defaults, explicit options take precedence."""
    config = tyro.cli(Config, args=command, prog="python -m eggroll.experiments.zo")
    return tyro.cli(Config, args=command, default=small_defaults(config))


def small_defaults(config: Config) -> Config:
    """Return the defaults of a configuration's recipe: the small model's settings, where that is what is tuned."""
    settings = SMALL.get(config.recipe, {}) if config.model is None else {}
    return dataclasses.replace(Config(), **settings)
