"""Rewards that fail in every way in their worker processes: no score is wrong, no batch hangs, no process is left.

    python -m eggroll.experiments.faultdrill.workers FAULTS SEED

Every batch has some completions that name a fault, among honest ones, whose score is their length.
"""

import gc
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from multiprocessing import resource_tracker
from typing import Any
from unittest import mock

from eggroll.envs.tasks import Scorer
from eggroll.experiments.faultdrill.survivors import new_mark, survivors

LIMIT, PATIENCE = 0.7, 180.0  # seconds: of a call; of a batch of a few faults, with the workers that replace those that ended
FRAME = b"EGW1"


def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Score lengths, but do what a completion says."""
    return [FAULTS[text]() if text in FAULTS else float(len(text)) for text in completions]


def _send(content: bytes) -> None:
    """Write over what the process replies, and hang."""
    end = next(found for found in gc.get_objects() if isinstance(found, socket.socket) and found.fileno() >= 0)
    end.sendall(content)
    time.sleep(600)


def _message(text: bytes, length: int | None = None) -> bytes:
    return FRAME + (len(text) if length is None else length).to_bytes(8, "little") + text


def _fail() -> float:
    raise ZeroDivisionError("of a completion")


def _child() -> float:
    subprocess.Popen(["sleep", "600"])
    os._exit(3)


def _fork() -> float:
    """Let a child run on, which would reply too."""
    os.fork()
    return 4.0


def _trickle() -> float:
    end = next(found for found in gc.get_objects() if isinstance(found, socket.socket) and found.fileno() >= 0)
    end.sendall(_message(b"", 1 << 20))
    while True:
        end.sendall(b" ")
        time.sleep(0.01)


FAULTS: dict[str, Any] = {
    "raise": _fail,
    "nan": lambda: float("nan"),
    "text": lambda: "1.0",
    "exit": lambda: os._exit(3),
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hang": lambda: time.sleep(600),
    "child": _child,
    "fork": _fork,
    "memory": lambda: float(len(bytearray(3 << 30))),
    "garbage": lambda: _send(b"\x80\x04never unpickled"),
    "half": lambda: _send(_message(b'["done", 1, [', 100)),
    "huge": lambda: _send(_message(b"", 1 << 40)),
    "flood": lambda: _send(_message(b'["done", 1, "' + b"x" * (1 << 25) + b'"]')),
    "nested": lambda: _send(_message(b"[" * 100_000)),
    "more": lambda: _send(_message(b'["done", 1, [9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0]]')),
    "trickle": _trickle,
}
HARMLESS = ("fork",)  # a score like any other


def worker_drill(*, faults: int, seed: int) -> dict[str, Any]:
    """Score batches with faults.

    Args:
        faults: number of completions that name one, each kind in turn.
        seed: of the order.

    Returns:
        "worker_faults" by kind; "silent": wrong scores; "hung": batches that took longer than `PATIENCE`; "leaked": processes
        that are left.
    """
    chance, kinds = random.Random(f"{seed} workers"), [list(FAULTS)[index % len(FAULTS)] for index in range(faults)]
    chance.shuffle(kinds)
    silent = hung = 0
    resource_tracker.ensure_running()  # unmarked: multiprocessing keeps it until this process ends
    mark = new_mark()
    with mock.patch.dict(os.environ, mark), Scorer(reward, workers=2, timeout=LIMIT, memory=1 << 30) as scorer:
        while kinds:
            some, kinds = kinds[:3], kinds[3:]
            texts = [*some, *("x" * chance.randint(5, 40) for _ in range(6))]
            chance.shuffle(texts)
            start = time.monotonic()
            found = scorer([""] * len(texts), texts)
            if time.monotonic() - start > PATIENCE:
                hung += 1
                print(f"hung: a batch with {', '.join(some)}", flush=True)
            failing = [text for text in texts if text in FAULTS and text not in HARMLESS]
            expected = [0.0 if text in failing else float(len(text)) for text in texts]
            wrong = [text for text, value, right in zip(texts, found.values, expected, strict=True) if value != right]
            wrong += [] if found.errors + found.timeouts == len(failing) else ["a failure that is not counted"]
            silent += len(wrong)
            if wrong:
                print(f"silent: scores of {', '.join(wrong)} among {', '.join(texts)}", flush=True)
    leaked = survivors(mark, within=5.0)
    counts = Counter(list(FAULTS)[index % len(FAULTS)] for index in range(faults))
    return {"worker_faults": dict(counts), "silent": silent, "hung": hung, "leaked": len(leaked)}


if __name__ == "__main__":
    print(json.dumps(worker_drill(faults=int(sys.argv[1]), seed=int(sys.argv[2]))))
