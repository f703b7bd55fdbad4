"""Compare recipes of zeroth-order fine-tuning at equal forward budget: `python -m experiments.zo_suite --help`.

Every recipe is `experiments.zo` in a process of its own, on the small model and the shipped task unless options say otherwise;
`adam` is backprop at as many steps as MeZO takes with one direction. The folder has a folder per recipe, and after every
recipe the table (`table.md`), the validation curves (`curves.png`) and all numbers (`results.json`). Started again with the
same folder it runs what is missing. The last line of standard output is a JSON object.
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from eggroll.experiments.common.run import print_summary, run_folder, write_json
from eggroll.experiments.common.seed_runs import finished_seeds, metrics_of, run_seeds
from eggroll.experiments.zo.config import BACKPROP, RECIPES, parse
from eggroll.experiments.zo.memory import step_mib
from eggroll.experiments.zo.table import Curves, Row, draw_curves, make_row, table
from eggroll.experiments.zo.warm_start import warm_start

SEARCH_SEED = 100
FACTORS = (1 / 3, 1.0, 3.0)  # of the known step size, that --search tries


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare recipes at equal forward budget. Options not listed here are handed to experiments.zo."""

    recipes: tuple[str, ...] = RECIPES
    """Recipes of experiments.zo."""
    seeds: int = 3
    """Seeds 0, 1, ... of every recipe."""
    forwards: int = 40_000
    """Forward passes of a batch for every recipe; adam takes half as many steps."""
    search: bool = False
    """First try a third, once and three times the known step size with seed 100; the lowest validation loss wins."""
    folder: Path = Path("runs/zo-suite")
    """Where everything is, also what an interrupted suite has finished."""


class Suite:
    """All runs of a suite, and what failed."""

    def __init__(self, config: Config, options: Sequence[str]):
        self.config, self.options, self.folder = config, tuple(options), run_folder(config.folder)
        self.chosen = {recipe: self._arguments(recipe) for recipe in config.recipes}
        self.failed: dict[str, str] = {}
        self._memory: dict[str, float] = {}
        for arguments in self.chosen.values():
            parse(arguments).check()

    def _arguments(self, recipe: str, rate: float | None = None) -> list[str]:
        forwards = self.config.forwards
        budget = ["--steps", str(forwards // 2)] if recipe == BACKPROP else ["--forwards", str(forwards)]
        return ["--recipe", recipe, *budget, *(["--learning-rate", f"{rate:.3g}"] if rate else []), *self.options]

    def finish(self, recipe: str) -> None:
        """Search where asked, run what is missing, write the results so far; a failure is noted and does not end the suite."""
        start = time.perf_counter()
        try:
            if self.config.search:
                self.chosen[recipe] = self._search(recipe)
            self._run(self.chosen[recipe], self.folder / recipe, range(self.config.seeds))
            self._memory[recipe] = step_mib(self.chosen[recipe], self.folder / "memory")
        except (RuntimeError, ValueError) as error:
            self.failed[recipe] = str(error)
        outcome = self.failed.get(recipe, " ".join(self.chosen[recipe]))
        print(f"{recipe}: {outcome}  ({(time.perf_counter() - start) / 60:.1f} min)", flush=True)
        self.write()

    def _run(self, arguments: list[str], folder: Path, seeds: Sequence[int]) -> list[dict[str, Any]]:
        """Run the seeds that are missing; return the summaries of all."""
        options = parse(arguments).settings()
        missing = [seed for seed in seeds if seed not in finished_seeds(folder, seeds, options=options)]
        resume = [] if arguments[1] == BACKPROP else ["--resume"]
        run_seeds(["eggroll.experiments.zo", *arguments, *resume], folder, missing)
        return list(finished_seeds(folder, seeds, options=options).values())

    def _search(self, recipe: str) -> list[str]:
        losses, known = {}, parse(self._arguments(recipe)).learning_rate
        if known is None:
            raise ValueError(f"no step size of {recipe} is known, around which to search")
        for factor in FACTORS:
            arguments = self._arguments(recipe, factor * known)
            (summary,) = self._run(
                arguments, self.folder / recipe / f"search-{factor:.2g}", range(SEARCH_SEED, SEARCH_SEED + 1)
            )
            loss = float("inf") if summary["validation_loss"] is None else summary["validation_loss"]
            losses[loss] = arguments
            words = f"validation loss {loss:.3f}, accuracy {summary['validation_accuracy']:.3f}"
            print(f"  {' '.join(arguments)}: {words}", flush=True)
        return losses[min(losses)]

    def _curves(self, recipe: str, forwards: int) -> Curves:
        curves = []
        for seed in range(self.config.seeds):
            rows = [row for row in metrics_of(self.folder / recipe, seed) if row.get("validation_accuracy") is not None]
            curves.append(([(row["generation"] + 1) * forwards for row in rows], [row["validation_accuracy"] for row in rows]))
        return curves

    def write(self) -> dict[str, Any]:
        """Write table, figure and numbers; return the summary."""
        seeds, found = range(self.config.seeds), {}
        for recipe in self._memory:
            options = parse(self.chosen[recipe]).settings()
            found[recipe] = list(finished_seeds(self.folder / recipe, seeds, options=options).values())
        ceiling = float("nan")
        if BACKPROP in found:
            ceiling = sum(s["test_accuracy"] for s in found[BACKPROP]) / len(found[BACKPROP])
        rows: list[Row] = []
        for recipe, summaries in found.items():
            known: dict[str, Any] = {"ceiling": ceiling, "step_mib": self._memory[recipe]}
            rows.append(make_row(parse(self.chosen[recipe]), summaries, **known))
        (self.folder / "table.md").write_text(table(rows))
        if rows:
            per_step = {row.recipe: row.forwards // row.steps for row in rows}
            draw_curves(
                {row.recipe: self._curves(row.recipe, per_step[row.recipe]) for row in rows}, self.folder / "curves.png"
            )
        summary = {"failed": self.failed, "rows": [row._asdict() for row in rows]}
        write_json(self.folder / "results.json", summary)
        return summary


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line; wrong options end it with one sentence."""
    config, options = tyro.cli(Config, args=arguments, prog="python -m experiments.zo_suite", return_unknown_args=True)
    try:
        if config.seeds < 1:
            raise ValueError(f"seeds must be an integer >= 1, got {config.seeds}.")
        suite = Suite(config, options)
        first = parse(suite.chosen[config.recipes[0]])
        if first.model is None:
            warm_start(first.start)  # once, before it is in anyone's seconds
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    for recipe in config.recipes:
        suite.finish(recipe)
    summary = suite.write()
    print(f"\n{(suite.folder / 'table.md').read_text()}\ntable, curves and numbers are in {suite.folder}", flush=True)
    print_summary(summary)
    if suite.failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
