"""One writer per run folder: a lock that the kernel releases when its process ends.

    lock = RunLock(folder)    RunInUse where another process, or another object of this one, writes the run
    lock.check()              before every write: RunLost if the folder is gone or another process has taken over

The lock is `flock` on FOLDER/run.lock. The file also has the writer's process, host and epoch, for the message, and for
filesystems without locks: there a second writer is not stopped, but the first one is, at its next write. Readers need no lock.
"""

import contextlib
import datetime
import errno
import importlib.util
import json
import os
import socket
import warnings
import weakref
from pathlib import Path
from typing import Any

fcntl: Any = importlib.import_module("fcntl") if importlib.util.find_spec("fcntl") else None  # not on Windows
NAME = "run.lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_held: "weakref.WeakSet[RunLock]" = weakref.WeakSet()


class RunInUse(ValueError):
    """Another writer has the run folder."""


class RunLost(RuntimeError):
    """The run folder was moved or deleted, or another process took over."""


class RunLock:
    """The lock of a run folder; held until `release`, or until its process ends or forgets it.

    Args:
        folder: exists.

    Raises:
        RunInUse: another writer holds it; the message has its process and host.
        OSError: the folder is not writable.
    """

    def __init__(self, folder: Path):
        self._path = folder.absolute() / NAME  # the process may change its working folder
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)  # not inherited by programs that this one starts
        self._close = weakref.finalize(self, os.close, self._file)
        try:
            self._lock(folder)
        except BaseException:
            self._close()
            raise
        self._epoch = _read(self._file).get("epoch", 0) + 1
        holder = {"epoch": self._epoch, "pid": os.getpid(), "host": socket.gethostname(), "since": _now()}
        content = json.dumps(holder).encode()
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, content, 0)
        _held.add(self)

    def _lock(self, folder: Path) -> None:
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, "there is no flock")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunInUse(f"{folder} is in use by {_describe(_read(self._file))}: end it, or choose another folder.") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            warnings.warn(f"the filesystem of {folder} has no locks: do not start a second process on this run.", stacklevel=4)

    def check(self) -> None:
        """Raise RunLost unless this object is still the writer of the folder."""
        try:
            found, own = os.stat(self._path), os.fstat(self._file)
        except FileNotFoundError:
            raise RunLost(
                f"the run folder {self._path.parent} was moved or deleted; what was written before is in it."
            ) from None
        holder = _read(self._file)
        if (found.st_dev, found.st_ino) != (own.st_dev, own.st_ino) or holder.get("epoch") != self._epoch:
            now = _describe(holder) if holder.get("epoch") != self._epoch else "another process"
            raise RunLost(f"the run folder {self._path.parent} was taken over by {now}.")

    def release(self) -> None:
        """Let others write the run."""
        _held.discard(self)
        self._close()


def _read(file: int) -> dict[str, Any]:
    with contextlib.suppress(ValueError, OSError):
        holder = json.loads(os.pread(file, 4096, 0))
        if isinstance(holder, dict) and isinstance(holder.get("epoch", 0), int):
            return holder
    return {}


def _describe(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')} (since {holder.get('since')})"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _let_go() -> None:
    """A forked child closes its copies of the locks, which would keep them held after the parent's end."""
    for lock in list(_held):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
