"""Options of `experiments.reason` for known models and tasks; experiments/LOG.md has the settings that failed."""

from pathlib import Path
from typing import Any

DEFAULT = "small"  # the small warm-started model, with the options' own defaults

PRESETS: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    "smollm2-sums": {  # two cores, no GPU
        "model": Path("smollm2"),
        "task": "arithmetic",
        "task_options": ("spaces=true",),
        "template": "\\n{prompt}",
        "stop": ("\\n",),
        "prompt_length": 8,
        "max_new_tokens": 5,
        "population_size": 32,
        "prompts": 32,
        "chunk_size": 8,
        "sigma": 0.003,
        "optimizer": "sgd",
        "learning_rate": 8.0,
        "seconds": 720.0,
        "check_every": 4,
        "examples": 3,
    },
}
