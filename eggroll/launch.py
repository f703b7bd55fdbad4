"""Start several processes of one run on this machine.

    python -m eggroll.launch 4 -m experiments.rl --mesh population=4

Everything after the number is passed to `python`. Every process gets one device: on a machine with GPUs the one with its index.
When a process fails, the others are terminated and the failure is reported. On Linux none survives this one, however it ends.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from eggroll.devices.processes import LAUNCHED

GRACE = 5.0  # seconds from SIGTERM to SIGKILL
END_WITH_PARENT = """  # what a process does first: have the kernel kill it (9) when its parent ends (PR_SET_PDEATHSIG, 1)
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
os.getppid() == int(sys.argv[1]) or os._exit(1)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def launch(count: int, arguments: Sequence[str]) -> str | None:
    """Run `python *arguments` in `count` processes until all have exited.

    Args:
        count: processes, >= 1.
        arguments: of python, such as `["-m", "eggroll.experiments.rl"]`.

    Returns:
        None when all succeeded, else an error message that names the process that failed first.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    running = []
    try:
        for index in range(count):
            values = (address, str(count), str(index))
            environment = os.environ | dict(zip(LAUNCHED, values, strict=True)) | {"JAX_LOCAL_DEVICE_IDS": str(index)}
            first = ["-c", END_WITH_PARENT, str(os.getpid())] if sys.platform == "linux" else []
            running.append(subprocess.Popen([sys.executable, *first, *arguments], env=environment))
        while True:
            codes = [process.poll() for process in running]
            failed = [index for index, code in enumerate(codes) if code]
            if failed:
                return _failure(failed[0], count, codes[failed[0]])
            if all(code == 0 for code in codes):
                return None
            time.sleep(0.05)
    finally:
        _terminate(running)


def _failure(index: int, count: int, code: int | None) -> str:
    assert code is not None
    what = f"exited with {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"
    return f"process {index} of {count} {what}; the others were terminated. A durable run can be resumed."


def _terminate(running: list[subprocess.Popen]) -> None:
    for process in running:
        process.terminate()
    deadline = time.monotonic() + GRACE
    for process in running:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given in (["--help"], ["-h"]):
        sys.stdout.write(f"{__doc__}\n")
        return
    if len(given) < 2 or not given[0].isdigit() or int(given[0]) < 1:
        sys.exit("usage: python -m eggroll.launch PROCESSES (SCRIPT | -m MODULE) [ARGUMENTS ...]")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # terminates the processes too
    try:
        failure = launch(int(given[0]), given[1:])
    except KeyboardInterrupt:
        sys.exit("interrupted: the processes were terminated. A durable run can be resumed.")
    if failure is not None:
        sys.exit(f"error: {failure}")


if __name__ == "__main__":
    main()
