"""Two processes want one run folder: one writes it at a time, and a kill or a stale lock does not keep the next one out.

python -m eggroll.experiments.faultdrill.rivals        reads folders from standard input, line by line
"""

import dataclasses
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eggroll.experiments.common.run import use_compilation_cache
from eggroll.experiments.faultdrill.training import make, work
from eggroll.journal import Reader
from eggroll.journal.lock import NAME, RunInUse
from eggroll.state import copy_state

GENERATIONS, EVERY = 120, 10
LOCKS = (b"", b"{", b"\0" * 64, b'{"epoch": "seven"}', b'{"epoch": 3, "pid": 1, "host": "gone", "since": "2026-01-01"}')


class Rival:
    """A process that opens a run when it is told to."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        command = [sys.executable, "-m", "eggroll.experiments.faultdrill.rivals"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.answer()

    def go(self, folder: Path) -> None:
        """Run or continue the run in a folder."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{folder}\n".encode())
        self._process.stdin.flush()

    def answer(self) -> tuple[str, str]:
        """Wait for what became of it: ("ended", fingerprint), ("refused", text) or ("failed", text)."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return tuple(json.loads(line)) if line else ("failed", "the process ended")

    def kill(self) -> None:
        """Kill it, and start another in its place."""
        self.end()
        self._start()

    def end(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()


@dataclasses.dataclass
class _Rounds:
    """Rounds of two rivals, each in a fresh folder."""

    folder: Path
    chance: random.Random
    rivals: tuple[Rival, Rival]
    answers: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def together(self) -> bool:
        """Both start at about the same time: one ends the run."""
        for rival in self._any_order():
            rival.go(self.folder)
            time.sleep(self.chance.choice((0.0, self.chance.random() * 0.1)))
        self.answers = [rival.answer() for rival in self.rivals]
        return any(what == "ended" for what, _ in self.answers)

    def later(self) -> bool:
        """One comes while the other runs, or has ended: the first one is not disturbed."""
        first, second = self._any_order()
        first.go(self.folder)
        time.sleep(self.chance.random() * 0.5)
        second.go(self.folder)
        self.answers = [first.answer(), second.answer()]
        return self.answers[0][0] == "ended"

    def killed(self) -> bool:
        """The writer is killed: the next one starts at once."""
        first, second = self._any_order()
        first.go(self.folder)
        time.sleep(self.chance.random() * 0.4)
        first.kill()
        second.go(self.folder)
        self.answers = [second.answer()]
        return self.answers[0][0] == "ended"

    def stale(self) -> bool:
        """A lock file is left over, which no process holds."""
        self.folder.mkdir(parents=True)
        (self.folder / NAME).write_bytes(self.chance.choice(LOCKS))
        self.rivals[0].go(self.folder)
        self.answers = [self.rivals[0].answer()]
        return self.answers[0][0] == "ended"

    def _any_order(self) -> list[Rival]:
        return self.chance.sample(self.rivals, 2)


SCENES: dict[str, Callable[[_Rounds], bool]] = {
    "together": _Rounds.together,
    "later": _Rounds.later,
    "killed": _Rounds.killed,
    "stale": _Rounds.stale,
}


def rival_drill(folder: Path, *, rounds: int, seed: int) -> dict[str, Any]:
    """Play rounds, each kind in turn.

    Returns:
        "rival_rounds" by kind; "refused": attempts to open that were; "silent": runs that ended as another run; "unresumable":
        rounds in which neither rival could run, or one failed.
    """
    chance, counts = random.Random(f"{seed} rivals"), Counter[str]()
    rivals, refused, silent, unresumable = (Rival(), Rival()), 0, 0, 0
    rivals[0].go(folder / "alone")
    expected = rivals[0].answer()[1]
    for index in range(rounds):
        scene = list(SCENES)[index % len(SCENES)]
        played = _Rounds(folder / f"round-{index}", chance, rivals)
        could_run = SCENES[scene](played)
        counts[scene] += 1
        ends = {text for what, text in played.answers if what == "ended"}
        failed = [text for what, text in played.answers if what == "failed"]
        whole = [entry.generation for entry in Reader(played.folder / "journal.bin")] if could_run else []
        refused += sum(what == "refused" for what, _ in played.answers)
        unresumable += not could_run or bool(failed)
        silent += could_run and (ends != {expected} or whole != list(range(GENERATIONS)))
        if not could_run or failed or ends != {expected}:
            print(f"round {index}, {scene}: {played.answers}", flush=True)
    for rival in rivals:
        rival.end()
    return {"rival_rounds": dict(counts), "refused": refused, "silent": silent, "unresumable": unresumable}


def serve() -> None:
    """Run what standard input says; answer in JSON."""
    use_compilation_cache()
    out, sys.stdout = sys.stdout, open(os.devnull, "w")  # noqa: SIM115
    es, initial = make({})

    def answer(*words: str) -> None:
        print(json.dumps(words), file=out, flush=True)

    answer("ready", "")
    for line in sys.stdin:
        made = es, copy_state(initial)
        try:
            answer("ended", work(Path(line.strip()), generations=GENERATIONS, checkpoint_every=EVERY, made=made))
        except RunInUse as error:
            answer("refused", str(error))
        except Exception as error:
            answer("failed", f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    serve()
