"""Which options of `experiments.reason` take effect where: the table that `Config.check` goes through."""

from typing import Any

from eggroll.experiments.common.options import only_with, unless

WORKED_TASK = "arithmetic"  # its worked examples can be wrong
_OF_EGGROLL = (
    "int8",
    "population_size",
    "group",
    "prompts",
    "samples",
    "pass_k",
    "sigma",
    "rank",
    "optimizer",
    "learning_rate",
    "anchor",
    "shaping",
    "noise_reuse",
    "freeze",
    "precision",
    "chunk_size",
    "memory_budget",
    "mesh",
    "resume",
    "accept_change",
    "plan",
    "probe",
)


def _updates_only_float32(config: Any) -> bool:
    return config.weights == "float" and (config.model is None or config.dtype == "float32")


def _noise_is_unused(config: Any) -> bool:
    return (
        config.data is not None or config.task != WORKED_TASK or any(text.startswith("noise=") for text in config.task_options)
    )


RULES = (
    only_with("algorithm", ("eggroll",), *_OF_EGGROLL),
    only_with("algorithm", ("grpo",), "grpo"),
    unless(lambda config: not config.resume, "without --resume: a new run has nothing that changed", "accept_change"),
    only_with("weights", ("int8",), "int8"),
    unless(
        lambda config: config.int8.threshold is not None, "with --int8.threshold, which takes its place", "int8.learning_rate"
    ),
    unless(lambda config: config.precision != "feedback", "without --precision feedback", "int8.window"),
    unless(lambda config: config.model is None, "without --model: the small model has float32 parameters", "dtype"),
    unless(lambda config: config.model is not None, "with --model: it is of the small model", "start"),
    unless(lambda config: config.data is not None, "with --data, whose rows are the task", "task", "task_options"),
    unless(lambda config: config.data is None, "without --data: it is of your own rows", "prompt_column", "key_column"),
    unless(_noise_is_unused, f"without --task {WORKED_TASK}, or with noise among --task-options", "start.noise"),
    unless(_updates_only_float32, "on float32 parameters: it is how bfloat16 and int8 ones are updated", "precision"),
    unless(lambda config: not config.sampling_temperature, "on greedy completions; give a --temperature", "top_p"),
    unless(lambda config: config.workers == 0, "with --workers 0: nothing stops a reward in this process", "timeout"),
    unless(
        lambda config: config.chunk_size is not None and not config.plan,
        "with --chunk-size, which takes its place",
        "memory_budget",
    ),
    unless(lambda config: config.plan, "with --plan, which is of one device", "mesh"),
    unless(
        lambda config: config.grpo.epochs * config.grpo.minibatches == 1,
        "with --grpo.epochs 1 and --grpo.minibatches 1: the probability ratio is 1 in the only step on a batch",
        "grpo.clip",
    ),
)

# Options that no bit of the parameters depends on: a run may be resumed with other values.
NOT_IDENTITY = (
    "preset",
    "seed",
    "seeds",
    "folder",
    "mesh",
    "chunk_size",
    "memory_budget",
    "generations",
    "seconds",
    "clock",
    "resume",
    "accept_change",
    "plan",
    "probe",
    "prompt_length",
    "workers",
    "timeout",
    "validation_size",
    "test_size",
    "examples",
    "check_every",
)
