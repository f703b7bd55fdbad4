"""Benchmarks: `python -m experiments.bench engine --help`; the others are `rl` and `scale`."""

import tyro

from experiments.bench import engine, rl, scale


def main() -> None:
    """Run one benchmark by name."""
    config = tyro.extras.subcommand_cli_from_dict({"engine": engine.Engine, "rl": rl.RL, "scale": scale.Scale})
    if isinstance(config, rl.RL):
        rl.run(config)
    elif isinstance(config, scale.Scale):
        scale.run(config)
    else:
        engine.run(config)


if __name__ == "__main__":
    main()
