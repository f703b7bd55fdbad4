"""Options of `experiments.reason` for known models and tasks; experiments/LOG.md has the settings that failed."""

from pathlib import Path
from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "small": {},  # the small warm-started model, with the options' own defaults
    "smollm2-sums": {  # two cores, no GPU
        "model": Path("smollm2"),
        "task": "arithmetic",
        "task_options": ("spaces=true",),
        "template": "12 + 35 = 47\\n{prompt}",
        "stop": ("\\n",),
        "prompt_length": 18,
        "max_new_tokens": 5,
        "population_size": 32,
        "prompts": 32,
        "chunk_size": 8,
        "sigma": 0.003,
        "optimizer": "sgd",
        "learning_rate": 6.0,
        "seconds": 600.0,
        "check_every": 4,
        "validation_size": 256,
        "examples": 3,
    },
}
