"""Drills in processes of their own, where late errors, marks and limits of one do not reach another."""

import json
import subprocess
import sys
from typing import Any


def run_apart(module: str, *arguments: object) -> dict[str, Any]:
    """Run a module of this package, whose last line of standard output is a JSON object; print the lines before it.

    Raises:
        RuntimeError: it failed; the message has the end of its errors.
    """
    command = [sys.executable, "-m", f"eggroll.experiments.faultdrill.{module}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(map(str, arguments))} failed with {done.returncode}: {done.stderr[-2000:]}")
    *lines, last = done.stdout.splitlines()
    print("".join(f"{line}\n" for line in lines), end="", flush=True)
    return json.loads(last)
