"""Check every use of parameters in the table: `python -m eggroll.experiments.uses --help`.

A use is low-rank and right, dense for a true reason, or refused by one clear error that names the parameter; nothing is
silently unperturbed. Every use is compared with members built explicitly on small shapes, and timed on larger ones. Writes
`uses.json` and `uses.md`; the last line of standard output is a JSON object.
"""

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

import eggroll
from eggroll.experiments.bench.timing import machine
from eggroll.experiments.common.run import exit_on_error, print_summary, run_folder, use_compilation_cache, write_json
from eggroll.experiments.uses.check import check, quiet
from eggroll.experiments.uses.report import Row, as_json, markdown, number, summarise
from eggroll.experiments.uses.table import COMPARED, USES, select
from eggroll.experiments.uses.timing import time_ratios
from eggroll.experiments.uses.use import Sizes
from eggroll.noise.rules import Spec

SMALL = Sizes(rows=4, width=8)


@dataclasses.dataclass(frozen=True)
class Config:
    """Check the uses of parameters in JAX programs against members built explicitly, and time them."""

    only: str = ""
    """Name or family of uses: a part of it, or a glob."""
    members: int = 16
    """Population size."""
    rank: int = 1
    """Rank of the perturbation."""
    noise: Literal["low-rank", "flipout"] = "low-rank"
    """Noise of the matrices."""
    size: int = 128
    """Width of the programs that are timed, a multiple of 8."""
    rows: int = 32
    """Examples of a batch that is timed."""
    timing: bool = True
    """Whether to time the uses."""
    folder: Path = Path("runs/uses")
    """Run folder."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    with exit_on_error():
        run(tyro.cli(Config, args=arguments, prog="python -m eggroll.experiments.uses"))


def run(config: Config) -> dict[str, Any]:
    """Check the uses and write the tables.

    Args:
        config: what to check.

    Returns:
        The summary, as printed on the last line.

    Raises:
        ValueError: an option is out of range.
    """
    _check_config(config)
    use_compilation_cache()
    start, folder, names = time.perf_counter(), run_folder(config.folder), select(config.only)
    about = {"config": dataclasses.asdict(config) | {"folder": str(config.folder)}, "about": machine()}
    rows = []
    for index, name in enumerate(names, start=1):
        rows.append(row := make_row(name, config))
        error = f"{row.finding.error:.1e}" if row.finding and row.finding.error is not None else "-"
        print(f"{index:>4}/{len(names)}  {name:<52}{row.role:<10}{error:>10}{number(row.ratio):>8}", flush=True)
    comparisons = _compare(names, config) if config.timing else {}
    summary = summarise(rows) | {"seconds": round(time.perf_counter() - start, 1)}
    write_json(folder / "uses.json", {**about, "summary": summary, "uses": [*map(as_json, rows)], "comparisons": comparisons})
    (folder / "uses.md").write_text(markdown(rows, comparisons))
    print_summary(summary)
    return summary


def _check_config(config: Config) -> None:
    if config.members < 2 or config.members % 2:
        raise ValueError(f"members must be even and at least 2, got {config.members}.")
    if config.size < 8 or config.size % 8:
        raise ValueError(f"size must be a multiple of 8, got {config.size}.")
    if config.rows < 1 or config.rank < 1:
        raise ValueError(f"rows and rank must be at least 1, got {config.rows} and {config.rank}.")


def _spec(config: Config) -> Spec:
    return eggroll.Flipout() if config.noise == "flipout" else eggroll.LowRank(config.rank)


def make_row(name: str, config: Config) -> Row:
    """Check one use, and time it if it evaluates."""
    use = USES[name]
    if not use.is_installed:
        return Row(name, None)
    with quiet():
        small = use.make(SMALL)
    finding = check(small, members=config.members, perturbation=_spec(config))
    if not config.timing or finding.error is None:
        return Row(name, finding)
    try:
        return Row(name, finding, _times(name, config).get("low-rank"))
    except Exception as error:
        note = f"at width {config.size}: {type(error).__name__}: {error}"
        return Row(name, dataclasses.replace(finding, role="wrong", note=" ".join(note.split())[:300]))


def _times(name: str, config: Config, *, generations: bool = False, **others: Spec) -> dict[str, float]:
    with quiet():
        program = USES[name].make(Sizes(config.rows, config.size))
    forms = {"low-rank": _spec(config), **others}
    return time_ratios(program, forms, members=config.members, generations=generations)


def _compare(names: Sequence[str], config: Config) -> dict[str, dict[str, float]]:
    """Ratios of the uses in `COMPARED` next to those with dense noise: of an evaluation, and of a whole generation.

    They are larger than in the table, since the update is made once for all members. None of a use that cannot be evaluated.
    """
    config = dataclasses.replace(config, members=16 * config.members, size=2 * config.size)
    found: dict[str, dict[str, float]] = {name: {} for name in COMPARED if name in names}
    for name in found:
        with contextlib.suppress(Exception):  # its row says why
            found[name] = _times(name, config, dense=eggroll.Dense())
            whole = _times(name, config, generations=True, dense=eggroll.Dense())
            found[name] |= {f"{form} generation": ratio for form, ratio in whole.items()}
    return found


if __name__ == "__main__":
    main()
