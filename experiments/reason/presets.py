"""Options of `experiments.reason` for known models and tasks; experiments/LOG.md has the settings that failed."""

from pathlib import Path
from typing import Any

_SMOLLM2: dict[str, Any] = {  # two CPU cores
    "model": Path("smollm2"),
    "stop": ("\\n",),
    "max_new_tokens": 5,
    "population_size": 32,
    "prompts": 32,
    "chunk_size": 8,
    "sigma": 0.003,
    "optimizer": "sgd",
    "learning_rate": 6.0,
    "int8.sigma": 1.0,
    "int8.optimizer": "sgd",
    "int8.learning_rate": 3.0,
    "grpo.prompts": 16,
    "grpo.microbatches": 8,
    "grpo.learning_rate": 1e-5,
    "seconds": 720.0,
    "check_every": 4,
    "validation_size": 256,
    "examples": 3,
}
_CHAIN = "State the final answer to the following arithmetic problem: 47 - 12 = 35\\n{prompt}"

PRESETS: dict[str, dict[str, Any]] = {
    "small": {},  # the small warm-started model, with the options' own defaults
    "smollm2-sums": _SMOLLM2 | {"task_options": ("spaces=true",), "template": "12 + 35 = 47\\n{prompt}"},
    "smollm2-chain": _SMOLLM2
    | {
        "task": "reasoning_gym/chain_sum",
        "task_options": ("min_terms=2", "max_terms=2", "min_digits=2", "max_digits=2", "validation=256", "test=512"),
        "template": _CHAIN,
    },
    "smollm2-countdown": _SMOLLM2
    | {"task": "short_countdown", "template": "numbers 24, 5 target 19: 24 - 5\\n{prompt}", "max_new_tokens": 8},
}
