"""Options of `python -m eggroll.experiments.bench memory`."""

import dataclasses
from pathlib import Path
from typing import Literal

from eggroll.experiments.bench.memory.models import DECODERS
from eggroll.experiments.bench.memory.optimizers import OPTIMIZERS
from eggroll.experiments.common.options import ignored_options, only_with, refuse
from eggroll.update.precision import PRECISIONS as OF_FLOATS

PRECISIONS = (*OF_FLOATS, "feedback")
RULES = (
    only_with("target", ("cpux8", "h100", "h100x8", "gpu"), "models", "layers", "implementation"),
    only_with("target", ("cpu",), "weights", "precisions", "small"),
    only_with("target", ("cpu", "run"), "optimizers"),
    only_with("target", ("run",), "model"),
    only_with("target", ("gpu",), "program"),
)
DEFAULT_MODELS = {"cpu": (), "cpux8": ("70b",), "h100": ("1b", "7b"), "h100x8": ("70b",), "gpu": ("1b", "7b"), "run": ()}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Compile the programs of a generation from shapes and report the memory that they need."""

    target: Literal["cpu", "cpux8", "h100", "h100x8", "gpu", "run"] = "cpu"
    """cpu: the update of a model of 604 M parameters; h100: generations, compiled for a GPU that need not be there;
    h100x8, cpux8: generations over a mesh of eight; gpu: generations on this machine's GPU, next to what it used; run: runs of
    `experiments.reason` on this machine's CPU, next to their plans."""
    model: Path | None = None
    """With run: folder of a checkpoint; None: the small model."""
    models: tuple[str, ...] = ()
    """Decoders of the targets other than cpu: tiny, 1b, 7b, 70b; default: 1b 7b, over eight devices 70b."""
    weights: Literal["bfloat16", "int8"] = "bfloat16"
    """With cpu: type of the parameters."""
    precisions: tuple[str, ...] = OF_FLOATS
    """With cpu: master, stochastic, nearest; with int8 also feedback, whose optimizer is sgd."""
    optimizers: tuple[str, ...] = tuple(OPTIMIZERS)
    """With cpu: sgd, adam (float32 moments), adam_bfloat16; with run the first two."""
    members: int = 256
    """Members of the population; those of a decoder read one token each."""
    layers: int | None = None
    """Layers of the decoders; None: all."""
    implementation: Literal["auto", "reference", "mosaic_gpu"] = "auto"
    """Implementation of the decoders' products; auto: what the engine chooses on the target."""
    program: Literal["plain", "generation"] | None = None
    """With gpu: run only this one, in this process; None: each in its own process, so that its peak is separate."""
    small: bool = False
    """With cpu: a model of no size."""


def check(config: Memory) -> None:
    """Exit with a clear error where an option is wrong."""
    choices: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
        "models": (config.models, tuple(DECODERS)),
        "precisions": (config.precisions, PRECISIONS),
        "optimizers": (config.optimizers, tuple(OPTIMIZERS)),
    }
    for name, (given, allowed) in choices.items():
        if unknown := sorted({*given} - {*allowed}):
            raise SystemExit(f"error: {name} must be among {', '.join(allowed)}, got {', '.join(unknown)}.")
    if "feedback" in config.precisions and config.weights != "int8":
        raise SystemExit("error: precisions feedback is for --weights int8.")
    try:
        refuse(ignored_options(config, RULES, Memory()))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    if config.members < 2 or config.members % 2:
        raise SystemExit(f"error: members must be an even integer >= 2, got {config.members}.")
    if config.layers is not None and config.layers < 1:
        raise SystemExit(f"error: layers must be an integer >= 1, got {config.layers}.")


def chosen_models(config: Memory) -> tuple[str, ...]:
    """Return the names of the decoders."""
    return config.models or DEFAULT_MODELS[config.target]
