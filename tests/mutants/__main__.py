"""Does the default suite protect the code? Breaks one line at a time in a copy and expects a test to fail: `make mutants`.

Every fault names the tests that are run first; where they pass, the whole default suite runs before the fault counts as missed.
Prints a table, Markdown rows for `experiments/LOG.md`; exits with 1 when a fault is missed or no longer applies.
"""

import argparse
import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tests.mutants.faults import FAULTS, Fault

ROOT = Path(__file__).parents[2]
COPIED = ("eggroll", "zo", "kernels", "envs", "experiments", "tests", "docs", "pyproject.toml", "README.md", "Makefile", ".git")


class Outcome(NamedTuple):
    """What became of one fault."""

    fault: Fault
    caught_by: str  # the first test that failed; "" when none did
    seconds: float


def mutated(fault: Fault, root: Path) -> None:
    """Break `fault.line` of the copy in `root`.

    Raises:
        ValueError: the line is not there exactly once.
    """
    path = root / fault.path
    source = path.read_text()
    if source.count(fault.line) != 1:
        raise ValueError(f"{fault.name}: {fault.path} has its line {source.count(fault.line)} times: {fault.line!r}")
    path.write_text(source.replace(fault.line, fault.broken))


def first_failure(root: Path, tests: tuple[str, ...]) -> str:
    """Run default tests of the copy until one fails; return its name, or ""."""
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return ""
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, flags=re.MULTILINE)
    return found[1] if found else f"pytest ended with {done.returncode}"


def judge(fault: Fault) -> Outcome:
    """Break a copy of the tree and run its tests."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "tree"
        ignored = shutil.ignore_patterns("__pycache__")
        root.mkdir()
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, root / name, symlinks=True, ignore=ignored)
            elif source.exists():
                shutil.copy(source, root / name)
        mutated(fault, root)
        caught_by = first_failure(root, fault.tests) or first_failure(root, ())
    return Outcome(fault, caught_by, time.perf_counter() - start)


def main() -> None:
    """Judge the faults whose names are given, all by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    chosen = [fault for fault in FAULTS if not options.names or fault.name in options.names]
    for fault in chosen:  # before anything runs
        source = (ROOT / fault.path).read_text()
        if source.count(fault.line) != 1:
            sys.exit(f"error: fault {fault.name!r}: {fault.path} has its line {source.count(fault.line)} times: {fault.line!r}")
    print("| fault | file | caught by | seconds |\n|---|---|---|---|", flush=True)
    missed = 0
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for outcome in pool.map(judge, chosen):
            missed += not outcome.caught_by
            caught = f"`{outcome.caught_by}`" if outcome.caught_by else "**nothing**"
            print(f"| {outcome.fault.name} | `{outcome.fault.path}` | {caught} | {outcome.seconds:.0f} |", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} faults are caught", flush=True)
    sys.exit(1 if missed or not chosen else 0)


if __name__ == "__main__":
    main()
