"""Benchmarks: `python -m experiments.bench engine --help`."""

import tyro

from experiments.bench import engine


def main() -> None:
    """Run one benchmark by name."""
    engine.run(tyro.extras.subcommand_cli_from_dict({"engine": engine.Engine}))


if __name__ == "__main__":
    main()
