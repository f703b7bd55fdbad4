"""`eggroll.launch` is ended in every way, at random moments: none of its processes survives."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from eggroll.experiments.faultdrill.survivors import new_mark, survivors
from eggroll.launch import GRACE

PROCESSES, STARTUP, PATIENCE = 2, 3.0, 60.0  # number; seconds in which they are ready, about; in which they have ended
SLEEPER = """
import os, signal, sys, time
if sys.argv[1] == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
time.sleep(600)
"""
# Python leaves SIGINT ignored where a shell in the background has ignored it.
LAUNCH = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from eggroll.launch import main; main()"
ENDS = {"SIGKILL": [signal.SIGKILL], "SIGTERM": [signal.SIGTERM], "two Ctrl-C": [signal.SIGINT, signal.SIGINT]}


def _ends(launcher: subprocess.Popen, *, again: signal.Signals) -> bool:
    """Whether a launcher ends in time; the last signal is repeated, as a user would press the keys again.

    While jax is imported Python collects garbage, and a callback of jax swallows a Ctrl-C that comes in the middle of that.
    """
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(subprocess.TimeoutExpired):
            launcher.wait(GRACE + 1)
            return True
        launcher.send_signal(again)
    return False


def launch_drill(folder: Path, *, ends: int, seed: int) -> dict[str, Any]:
    """Start and end the launcher.

    Returns:
        "launches" by how they ended; "hung": launchers that did not end; "leaked": processes that are left.
    """
    chance, counts, hung, leaked = random.Random(f"{seed} launches"), Counter[str](), 0, 0
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "sleeper.py"
    script.write_text(SLEEPER)
    for index in range(ends):
        how, kind = list(ENDS)[index % len(ENDS)], chance.choice(("stubborn", "willing"))
        command = [sys.executable, "-c", LAUNCH, str(PROCESSES), str(script), kind]
        mark = new_mark()
        silent: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        launcher = subprocess.Popen(command, env=os.environ | mark, **silent)
        time.sleep(chance.random() * STARTUP)
        for number in ENDS[how]:
            launcher.send_signal(number)
            time.sleep(chance.random() * 0.3)
        if not _ends(launcher, again=ENDS[how][-1]):
            hung += 1
            print(f"hung: launch {index}, {how}", flush=True)
            launcher.kill()
            launcher.wait()
        counts[how] += 1
        left = survivors(mark, within=3.0)
        leaked += len(left)
        if left:
            print(f"launch {index}, {how}: {len(left)} of its processes survive", flush=True)
            for process in left:
                os.kill(process, signal.SIGKILL)
    return {"launches": dict(counts), "hung": hung, "leaked": leaked}
