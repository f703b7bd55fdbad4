"""Kill the training at every kind of moment, and restart it; of several processes, their launcher."""

import dataclasses
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

MOMENTS = ("start", "training", "journal", "checkpoint")
OF_SEVERAL = ("start", "training")  # moments at which a launcher can be killed
STARTUP, SHORT = 3.0, 0.02  # seconds: start-up of a process; a few generations


@dataclasses.dataclass
class Drill:
    """Counts of a drill."""

    kills: dict[str, int]
    processes: int = 1
    resumes: int = 0
    lost: int = 0  # generations reported before a kill and repeated after it
    done: int = 0  # generations reported

    def start(
        self, folder: Path, generations: int, checkpoint_every: int, *, die: tuple[str, int] | None = None, delay: float = 0.0
    ) -> bool:
        """Run the training until it exits or is killed.

        Args:
            folder: of the run.
            generations: of the whole run.
            checkpoint_every: generations between checkpoints.
            die: moment and generation of the kill; None: no kill.
            delay: seconds to the kill, from the start of the process ("start", but no later than its first report) or from the
                report of the generation ("training"); at other moments the training kills itself.

        Returns:
            Whether the training completed.
        """
        moment, at = die or ("none", 0)
        command = [sys.executable, "-m"]
        command += ["eggroll.launch", str(self.processes), "-m"] if self.processes > 1 else []
        command += ["eggroll.experiments.faultdrill.training", str(folder), str(generations), str(checkpoint_every)]
        command += [moment, str(at)] if moment in ("journal", "checkpoint") else []
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        if moment == "start":
            threading.Timer(delay, process.kill).start()
        reported: int | None = None
        for line in process.stdout:
            if line.startswith("started at "):
                started = int(line.split()[-1])
                self.lost += max(0, self.done - started)
                self.resumes += started > 0
            elif line.strip().isdigit():
                reported = int(line) + 1
                if moment == "start" or (moment == "training" and reported > at):
                    time.sleep(0 if moment == "start" else delay)
                    process.kill()
                    moment = "none"
        errors = process.communicate()[1].strip().splitlines() or ["no error output"]
        code = process.returncode
        # The kill may have interrupted the recording of the last reported generation.
        self.done = max(self.done, 0 if reported is None else reported - 1)
        if code not in (0, -signal.SIGKILL):
            raise RuntimeError(f"the training exited with {code}: {errors[-1]}")
        return code == 0


def drill(
    folder: Path, *, generations: int, checkpoint_every: int, kills: int, seed: int, processes: int = 1
) -> dict[str, Any]:
    """Kill and resume until the run is complete; return the counts."""
    chance, kinds = random.Random(seed), MOMENTS if processes == 1 else OF_SEVERAL
    moments = [kinds[index % len(kinds)] for index in range(kills)]
    chance.shuffle(moments)
    state = Drill(dict.fromkeys(kinds, 0), processes)
    for index, moment in enumerate(moments):
        # Spread the kills over the run.
        at = chance.randrange(*(generations * (index + part) // (kills + 1) for part in (0, 1)))
        delay = chance.random() * (STARTUP if moment == "start" else SHORT)
        if state.start(folder, generations, checkpoint_every, die=(moment, at), delay=delay):
            break
        state.kills[moment] += 1
        print(f"kill {index + 1}/{kills} in {moment}: {state.done} generations reported", flush=True)
    ended = state.start(folder, generations, checkpoint_every)
    counts = {"kills": sum(state.kills.values()), "kills_in": state.kills, "resumes": state.resumes}
    return counts | {"lost_generations": state.lost, "ended": ended}
