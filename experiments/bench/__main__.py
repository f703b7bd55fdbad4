"""Benchmarks: `python -m experiments.bench engine --help`, `python -m experiments.bench rl --help`."""

import tyro

from experiments.bench import engine, rl


def main() -> None:
    """Run one benchmark by name."""
    config = tyro.extras.subcommand_cli_from_dict({"engine": engine.Engine, "rl": rl.RL})
    if isinstance(config, rl.RL):
        rl.run(config)
    else:
        engine.run(config)


if __name__ == "__main__":
    main()
