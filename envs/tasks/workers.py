"""Processes that score: started by spawn, which is safe with JAX, killed when they exceed a time limit, and replaced.

Only this file handles processes. A worker has its own session, so that processes started by a reward die with it. This is not
a sandbox: a reward that runs code written by a model runs it with the permissions of the user.
"""

import contextlib
import os
import pickle
import signal
import time
from collections import deque
from collections.abc import Callable
from multiprocessing import connection, get_context
from typing import Any, NamedTuple, NoReturn

from eggroll.envs.tasks.calls import shorten

STARTUP_SECONDS = 120.0  # of a worker: it imports the reward's module and what that imports


class TimedOut(NamedTuple):
    """A job's reply: it exceeded its time."""


class Died(NamedTuple):
    """A job's reply: its worker ended."""

    exit_code: int | None


class Failed(NamedTuple):
    """Message of a worker that cannot start."""

    text: str


class _Worker:
    """One process and its current job."""

    def __init__(self, function: bytes):
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, function), daemon=True)
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid
        theirs.close()
        self.ready = False
        self.job: int | None = None
        self.deadline = time.monotonic() + STARTUP_SECONDS

    @property
    def is_busy(self) -> bool:
        return not self.ready or self.job is not None

    def kill(self) -> int | None:
        """End the process and its children; return its exit code."""
        with contextlib.suppress(ProcessLookupError):  # the worker has no session yet
            os.killpg(self.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        code = self.process.exitcode
        self.process.close()
        self.connection.close()
        return code


class Pool:
    """Workers that call one function.

    Args:
        function: maps a job to its reply; can be pickled.
        workers: processes, at least 1.
        timeout: seconds a call may take.

    Raises:
        TypeError: `function` cannot be pickled.
    """

    def __init__(self, function: Callable[[Any], Any], *, workers: int, timeout: float):
        try:
            self._function = pickle.dumps(function)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise TypeError(f"it cannot be pickled: {error}") from None
        self._timeout = timeout
        self._workers = [_Worker(self._function) for _ in range(workers)]

    def map(self, jobs: list) -> list:
        """Return the function's replies to jobs, in order; `TimedOut` or `Died` for a job without one.

        Raises:
            RuntimeError: a worker cannot start, or the pool is closed.
        """
        if not self._workers:
            raise RuntimeError("the scorer is closed.")
        replies: list[Any] = [None] * len(jobs)
        waiting = deque(range(len(jobs)))
        try:
            while waiting or any(worker.job is not None for worker in self._workers):
                for worker in [worker for worker in self._workers if not worker.is_busy][: len(waiting)]:
                    self._send(worker, jobs, waiting)
                self._collect(replies)
        finally:  # an error leaves no worker with a job of this call
            for worker in [worker for worker in self._workers if worker.job is not None]:
                self._replace(worker)
        return replies

    def close(self) -> None:
        """End every process."""
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def _send(self, worker: _Worker, jobs: list, waiting: deque[int]) -> None:
        try:
            worker.connection.send(jobs[waiting[0]])
        except (BrokenPipeError, ConnectionResetError):  # it died while it had nothing to do
            self._replace(worker)
        else:
            worker.job, worker.deadline = waiting.popleft(), time.monotonic() + self._timeout

    def _collect(self, replies: list) -> None:
        """Wait for a reply or a deadline; store all replies."""
        pending = [worker for worker in self._workers if worker.is_busy]
        nearest = min(worker.deadline for worker in pending) - time.monotonic()
        answered = connection.wait([worker.connection for worker in pending], timeout=max(nearest, 0))
        for worker in pending:
            if worker.connection in answered:
                self._receive(worker, replies)
            elif time.monotonic() >= worker.deadline:
                if worker.job is None:
                    self._give_up(f"a worker did not start within {STARTUP_SECONDS:.0f} s.")
                replies[worker.job] = TimedOut()
                self._replace(worker)

    def _receive(self, worker: _Worker, replies: list) -> None:
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            if not worker.ready:
                self._give_up(
                    'a worker ended before it had started; a script that scores needs `if __name__ == "__main__":` around what'
                    " it runs."
                )
            code = self._replace(worker)
            if worker.job is not None:
                replies[worker.job] = Died(code)
            return
        if isinstance(message, Failed):
            self._give_up(f"a worker could not import the reward: {message.text}.")
        if worker.job is not None:
            replies[worker.job] = message
        worker.ready, worker.job = True, None

    def _replace(self, worker: _Worker) -> int | None:
        """End a worker and start another in its place; return the exit code of the first."""
        code = worker.kill()
        self._workers[self._workers.index(worker)] = _Worker(self._function)
        return code

    def _give_up(self, why: str) -> NoReturn:
        self.close()
        raise RuntimeError(why)


def _serve(pipe: connection.Connection, function: bytes) -> None:
    """Run a worker: announce it, then reply to jobs until the other end closes."""
    os.setsid()
    try:
        call = pickle.loads(function)
    except Exception as error:
        pipe.send(Failed(shorten(f"{type(error).__name__}: {error}")))
        return
    with contextlib.suppress(EOFError, BrokenPipeError):
        pipe.send(None)
        while True:
            pipe.send(call(pipe.recv()))
