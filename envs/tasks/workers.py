"""Processes that score: started by spawn, which is safe with JAX, killed when they exceed a time limit, and replaced.

Only this file handles processes. A worker leads a process group, which is killed with it: all that a reward starts, except
what it puts into a session of its own. A worker ends when the trainer does, for whatever reason. Jobs are pickled; replies are
JSON, which a reward that writes nonsense cannot turn into code. This is not a sandbox: a reward that runs code written by a
model runs it with the permissions of the user.
"""

import contextlib
import importlib.util
import json
import os
import pickle
import selectors
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any, NamedTuple, NoReturn

from eggroll.envs.tasks.calls import shorten
from eggroll.envs.tasks.channel import Channel, Unreadable, receive, send

STARTUP_SECONDS = 120.0  # of a worker: it imports the reward's module and what that imports


class TimedOut(NamedTuple):
    """A job's reply: it exceeded its time."""


class Died(NamedTuple):
    """A job's reply: its worker ended, or sent something unreadable."""

    exit_code: int | None  # None: it was unreadable


class _Worker:
    """One process and its current job."""

    def __init__(self, function: bytes, memory: int):
        context = get_context("spawn")
        ours, theirs = socket.socketpair()
        self.lifeline, guarded = socket.socketpair()  # never written to; it closes when this process ends
        self.process = context.Process(target=_serve, args=(theirs, guarded, function, memory), daemon=True)
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid
        theirs.close()
        guarded.close()
        self.channel = Channel(ours)
        self.ready = False
        self.job: int | None = None
        self.number = 0  # of the job, in its request and its reply: a process that a reward forked may reply, too
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
        self.channel.close()
        self.lifeline.close()
        return code


class Pool:
    """Workers that call one function.

    Args:
        function: maps a job to its reply, a JSON value; can be pickled. Where it has a method `prepare`, a worker calls that
            first, in the time of its start; `accepts(job, reply)` decides whether a reply can be one.
        workers: processes, at least 1.
        timeout: seconds a call may take, including sending the job and receiving the reply.
        memory: bytes that a worker may allocate.

    Raises:
        TypeError: `function` cannot be pickled.
    """

    def __init__(self, function: Callable[[Any], Any], *, workers: int, timeout: float, memory: int):
        try:
            self._function = pickle.dumps(function)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise TypeError(f"it cannot be pickled: {error}") from None
        self._accepts = getattr(function, "accepts", lambda job, reply: True)
        self._timeout, self._memory = timeout, memory
        self._workers = [_Worker(self._function, memory) for _ in range(workers)]

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
                self._collect(jobs, replies)
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
        worker.number += 1
        job = pickle.dumps((worker.number, jobs[waiting[0]]))
        try:
            worker.channel.start_to_send(job)
        except OSError:  # it died while it had nothing to do
            self._replace(worker)
        else:
            worker.job, worker.deadline = waiting.popleft(), time.monotonic() + self._timeout

    def _collect(self, jobs: list, replies: list) -> None:
        """Wait until something happens or a deadline passes; store all replies."""
        pending = [worker for worker in self._workers if worker.is_busy]
        nearest = min(worker.deadline for worker in pending) - time.monotonic()
        with selectors.DefaultSelector() as selector:
            for worker in pending:
                writes = selectors.EVENT_WRITE if worker.channel.has_more_to_send else 0
                selector.register(worker.channel, selectors.EVENT_READ | writes)
            events = {key.fileobj: event for key, event in selector.select(max(nearest, 0))}
        for worker in pending:
            event = events.get(worker.channel, 0)
            if event & selectors.EVENT_WRITE:
                with contextlib.suppress(OSError):  # it has ended, which reading says as well
                    worker.channel.send_more()
            settled = bool(event & selectors.EVENT_READ) and self._receive(worker, jobs, replies)
            if not settled and time.monotonic() >= worker.deadline:
                if worker.job is None:
                    self._give_up(f"a worker did not start within {STARTUP_SECONDS:.0f} s.")
                replies[worker.job] = TimedOut()
                self._replace(worker)

    def _receive(self, worker: _Worker, jobs: list, replies: list) -> bool:
        """Take what a worker sent; return whether that settles what it was doing."""
        try:
            message = worker.channel.receive()
            if message is None:
                return False
            kind, number, value = json.loads(message)
            if worker.job is not None and (number != worker.number or not self._accepts(jobs[worker.job], value)):
                raise Unreadable
        except (EOFError, OSError):
            if not worker.ready:
                self._give_up(
                    'a worker ended before it had started; a script that scores needs `if __name__ == "__main__":` around what'
                    " it runs."
                )
            self._bury(worker, replies, readable=True)
            return True
        except (Unreadable, ValueError, TypeError, RecursionError):
            self._bury(worker, replies, readable=False)
            return True
        if kind == "failed":
            self._give_up(f"a worker could not import the reward: {value}.")
        if worker.job is not None:
            replies[worker.job] = value
        worker.ready, worker.job = True, None
        return True

    def _bury(self, worker: _Worker, replies: list, *, readable: bool) -> None:
        code = self._replace(worker)
        if worker.job is not None:
            replies[worker.job] = Died(code if readable else None)

    def _replace(self, worker: _Worker) -> int | None:
        """End a worker and start another in its place; return the exit code of the first."""
        code = worker.kill()
        self._workers[self._workers.index(worker)] = _Worker(self._function, self._memory)
        return code

    def _give_up(self, why: str) -> NoReturn:
        self.close()
        raise RuntimeError(why)


def half_of_memory() -> int:
    """Half of the bytes of this machine's memory; where that is not known, a terabyte."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, ValueError, OSError):
        return 1 << 40


def _serve(end: socket.socket, lifeline: socket.socket, function: bytes, memory: int) -> None:
    """Run a worker: announce it, then reply to jobs until the trainer ends."""
    os.setsid()
    _guard(lifeline)
    if importlib.util.find_spec("resource"):  # not on Windows
        import resource

        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (memory if hard == resource.RLIM_INFINITY else min(memory, hard), hard))
    try:
        call = pickle.loads(function)
        getattr(call, "prepare", lambda: None)()
    except Exception as error:
        _reply(end, "failed", 0, shorten(f"{type(error).__name__}: {error}"))
        return
    own = os.getpid()
    with contextlib.suppress(EOFError, OSError):
        _reply(end, "ready", 0, None)
        while True:
            number, job = pickle.loads(receive(end))
            value = call(job)
            if os.getpid() != own:  # a reward forked, and its child came here
                os._exit(0)
            _reply(end, "done", number, value)


def _guard(lifeline: socket.socket) -> None:
    """Start a process that kills this one's process group when the trainer ends, whatever a reward does meanwhile."""
    if os.fork() == 0:
        os.closerange(3, lifeline.fileno())  # so that the socket closes, and the trainer notices, when the worker itself exits
        os.closerange(lifeline.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
        with contextlib.suppress(OSError):
            lifeline.recv(1)
        os.killpg(0, signal.SIGKILL)
    lifeline.close()


def _reply(end: socket.socket, kind: str, number: int, value: Any) -> None:
    send(end, json.dumps([kind, number, value]).encode())
