"""Benchmarks: `python -m eggroll.experiments.bench engine --help`.

Others: `floor`, `decode`, `rl`, `scale`, `populations`, `zo`, `egg`, `kernels`, `memory`, `feedback`, `offload`. `gpu` runs
those that need a GPU and writes a report.
"""

from typing import Any

import tyro

from eggroll.experiments.bench import decode, egg, engine, feedback, floor, gpu_report, kernels, populations, rl, scale, zo
from eggroll.experiments.bench.memory import command as memory
from eggroll.experiments.bench.offload import command as offload


def main() -> None:
    """Run one benchmark by name."""
    benchmarks: Any = {
        "engine": (engine.Engine, engine.run),
        "floor": (floor.Floor, floor.run),
        "decode": (decode.Decode, decode.run),
        "rl": (rl.RL, rl.run),
        "scale": (scale.Scale, scale.run),
        "populations": (populations.Populations, populations.run),
        "zo": (zo.ZO, zo.run),
        "egg": (egg.EGG, egg.run),
        "kernels": (kernels.Kernels, kernels.run),
        "memory": (memory.Memory, memory.run),
        "feedback": (feedback.FeedbackBench, feedback.run),
        "offload": (offload.OffloadBench, offload.run),
        "gpu": (gpu_report.GPU, gpu_report.run),
    }
    config = tyro.extras.subcommand_cli_from_dict(
        {name: options for name, (options, _) in benchmarks.items()}, prog="python -m eggroll.experiments.bench"
    )
    next(run for options, run in benchmarks.values() if isinstance(config, options))(config)


if __name__ == "__main__":
    main()
