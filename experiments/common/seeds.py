"""The seeds of one experiment in this process: a folder for each, prepared or resumed, and one summary of all."""

import contextlib
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from eggroll.devices.processes import first_does, is_first
from eggroll.experiments.common.checkpoint import OLD
from eggroll.experiments.common.memory import peak_mib
from eggroll.experiments.common.run import SUMMARY, named_folder, run_folder, write_json
from eggroll.files import CHECKSUM, replace_file
from eggroll.journal.lock import RunLock
from eggroll.runs.log import NAME, logged

_MARKS = ("journal.header.json", "journal.bin", "metrics.jsonl")  # of a run; with none of them other files are the user's
_KEPT_BY_RESUME = ("checkpoints", "samples", f"best{OLD}", "best", *_MARKS)  # marks last: a kill in between leaves one
_REPLACED = ("checkpoints", "samples", "best", "checkpoint")  # folders that are of a run, or of the user
_RESULTS = ("checkpoint", "fitness.png", "curves.png", "bits_per_byte.png", "policy.gif")  # but not a model, which may be read
MODEL = "model"  # of a run: the folder of its last parameters
Row = dict[str, Any]


class Seeded(Protocol):
    """What the options of every experiment have."""

    @property
    def folder(self) -> Path | None:
        """The run folder, with a folder per seed in it if there are several."""

    @property
    def seed(self) -> int:
        """The first seed."""

    @property
    def seeds(self) -> int:
        """Number of runs, with the seeds seed, seed + 1, ..."""

    @property
    def resume(self) -> bool:
        """Whether to continue the run in the folder."""


class SeedRun(NamedTuple):
    """The run of one seed."""

    seed: int
    folder: Path
    recipe: dict[str, Any]  # for its journal: the function that remakes strategy and initial state, and the options
    lock: RunLock | None = None  # of the folder, held until its summary is written; None: by another process, or not at all


def run_seeds(
    config: Seeded,
    train: Callable[[SeedRun], Row],
    *,
    experiment: str,
    default: str,
    options: Mapping[str, Any],
    recorded: Mapping[str, Any] | None = None,
    check: Callable[[Path], None] = lambda folder: None,
) -> Row:
    """Train with every seed; write `summary.json` of each last, which marks the run as finished.

    Args:
        config: seeds and folder.
        train: trains with one seed, writes its artefacts, returns the fields of its summary.
        experiment: its name, such as "rl", whose `__main__` has the function `remake` of the journal's recipe.
        default: name of the folder of a seed if the options name none: `runs/<default>-<seed>`.
        options: that determine what a seed gives; stored in `summary.json` and in the recipe.
        recorded: further fields of `summary.json`.
        check: of the folder of a seed, called for all before the first one is trained; raises ValueError.

    Returns:
        The fields of the only seed, or the means of the numbers of all, with the fields of each under "seeds".

    Raises:
        ValueError: as `prepare_folder` and `check`, for any of the seeds before the first one is trained.
    """
    rows, seeds = [], range(config.seed, config.seed + config.seeds)
    # Absolute, and before the first seed: what a user's code does to the working folder moves no run.
    folders = [seed_folder(config, seed, default=default).absolute() for seed in seeds]
    for folder in folders:  # before the first one is trained
        first_does(lambda: _refuse_files_of_the_user(folder))  # noqa: B023
        first_does(lambda: check(folder))  # noqa: B023
    for seed, folder in zip(seeds, folders, strict=True):
        recipe = {"function": f"eggroll.experiments.{experiment}.__main__:remake", "options": {**options, "seed": seed}}
        with prepare_folder(folder, resume=config.resume) as lock:
            with logged(folder, append=config.resume):
                row = train(SeedRun(seed, folder, recipe, lock)) | {"peak_mib": round(peak_mib())}
            _write_summary(folder, {"options": options, "seed": seed, **(recorded or {}), **row}, lock)
        rows.append(row)
    if len(rows) == 1:
        return rows[0]
    numbers = [name for name, value in rows[0].items() if isinstance(value, int | float)]
    means = {name: statistics.fmean(row[name] for row in rows) for name in numbers}
    return means | {"seeds": [{"seed": config.seed + index} | row for index, row in enumerate(rows)]}


@contextlib.contextmanager
def _keeps_mark(folder: Path) -> Iterator[None]:
    """Put the mark of a finished run back if what follows ends with an error before it has changed the run."""
    path, run = folder / SUMMARY, folder / "journal.bin"

    def read_run() -> tuple[int, int] | None:
        return (run.stat().st_size, run.stat().st_mtime_ns) if run.is_file() else None

    mark, before = path.read_bytes() if is_first() and path.is_file() else None, read_run()
    try:
        yield
    except BaseException:
        if is_first() and mark is not None and before is not None and read_run() == before:
            with contextlib.suppress(OSError):  # what ended the run is the error to show
                replace_file(path, mark)  # not `first_does`: the others need not have failed
        raise


def _write_summary(folder: Path, summary: Row, lock: RunLock | None) -> None:
    def write() -> None:
        if lock is not None:
            lock.check()
        write_json(folder / SUMMARY, summary)

    first_does(write)


def seed_folder(config: Seeded, seed: int, *, default: str) -> Path:
    """Make the folder of a seed; if the options name none it is `runs/<default>-<seed>`."""
    if config.folder is None:
        return run_folder(f"{default}-{seed}")
    if config.seeds == 1:
        return run_folder(config.folder)
    own, earlier = named_folder(config.folder) / f"seed-{seed}", config.folder / f"seed-{seed}"  # where earlier versions put it
    return run_folder(earlier if config.resume and earlier.is_dir() and not own.exists() else own)


def refuse_own_model(config: Seeded, model: Path | None, *, default: str) -> None:
    """Raise ValueError where a run would replace the model that it starts from.

    Args:
        config: seeds and folder.
        model: folder of a checkpoint.
        default: as for `run_seeds`.
    """
    if model is None or model.resolve().name != MODEL:
        return
    for seed in range(config.seed, config.seed + config.seeds):
        own = seed_folder(config, seed, default=default)
        if (own / MODEL).resolve() == model.resolve():
            raise ValueError(f"model {model} is that of the run in {own}, which would replace it; choose another folder.")


@contextlib.contextmanager
def prepare_folder(folder: Path, *, resume: bool) -> Iterator[RunLock | None]:
    """Hold the lock of a folder; first remove the mark of a finished run and, without `resume`, what could be continued.

    Yields:
        The lock; None in processes other than the first.

    Raises:
        RunInUse: another run writes into the folder, which stays as it is.
        ValueError: the folder never had a run, but files that a run would replace; they stay.
    """
    lock = first_does(lambda: RunLock(folder))
    try:
        with _keeps_mark(folder) if resume else contextlib.nullcontext():
            first_does(lambda: _clear(folder, resume=resume))
            yield lock
    finally:
        if lock is not None:
            lock.release()


def _clear(folder: Path, *, resume: bool) -> None:
    """Remove the mark of a finished run and, without `resume`, the run."""
    _refuse_files_of_the_user(folder)
    old = () if resume or not _has_run(folder) else (*_RESULTS, *_KEPT_BY_RESUME)
    (folder / SUMMARY).unlink(missing_ok=True)
    for path in (folder / name for name in old):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _refuse_files_of_the_user(folder: Path) -> None:
    """Raise ValueError where a folder has what a run would replace, and never had a run."""
    if not _has_run(folder) and (users := [name for name in _REPLACED if _has_files(folder / name)]):
        raise ValueError(f"{folder} has no run, but {', '.join(users)}, which a run would replace; choose another folder.")


def refuse_model_of_the_user(folder: Path) -> None:
    """Raise ValueError where a folder has a model, which a run would replace at its end, and never had a run."""
    if not _has_run(folder) and not (folder / NAME).exists() and _has_files(folder / MODEL):
        raise ValueError(f"{folder} has no run, but {MODEL}, which a run would replace; choose another folder.")


def _has_files(path: Path) -> bool:
    """Whether there is a file, or a folder with more in it than a run leaves that is killed while it makes the folder."""
    return any(child.suffix != ".partial" for child in path.iterdir()) if path.is_dir() else path.exists()


def _has_run(folder: Path) -> bool:
    """Whether a run was begun in a folder."""
    checkpoints = folder / "checkpoints"
    if any((folder / name).exists() for name in (SUMMARY, *_MARKS)):
        return True
    if (checkpoints / "settings.json").exists():  # of an offloaded run of version 0.1
        return True
    first = checkpoints / "config.json"  # of a run that was killed before it had a journal
    return first.is_file() and CHECKSUM.encode() in first.read_bytes()
