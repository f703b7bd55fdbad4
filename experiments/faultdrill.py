"""Kills a training run at random moments and lets it go on: `python -m experiments.faultdrill --help`.

A small network is trained in a process of its own, with a journal and checkpoints. The process is killed (SIGKILL) after a
random time, in the middle of writing a record of the journal, or in the middle of writing a checkpoint, and started again,
until it is done. Its parameters must be those of a run that nobody disturbed, bit for bit. Then copies of its files are cut off
or get a flipped bit, and every damage must be found, or do no harm. The last line of standard output is a JSON object.
"""

import contextlib
import dataclasses
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import eggroll
from eggroll.checkpoint import Checkpoints
from eggroll.durable import DurableRun
from eggroll.fingerprint import fingerprint
from eggroll.journal import JournalError, Reader
from eggroll.training import Record, train
from experiments.common.run import print_summary, run_folder

MOMENTS = ("training", "journal", "checkpoint")
RECIPE = "experiments.faultdrill:make"


@dataclasses.dataclass(frozen=True)
class Config:
    """Kill a training run at random moments, resume it every time, compare it with an undisturbed run."""

    kills: int = 21
    """How often the run is killed, a third each in training, in writing the journal, in writing a checkpoint."""
    generations: int = 400
    """Generations of the run."""
    checkpoint_every: int = 10
    """Generations between checkpoints."""
    damages: int = 40
    """Copies of the files that are damaged, half of them cut off, half with a flipped byte."""
    seed: int = 0
    """Seed of the moments and the damages."""
    folder: Path = Path("runs/faultdrill")
    """Run folder; it is emptied first."""
    worker: str | None = None
    """Internal: run the training in this folder."""
    die: tuple[str, int] | None = None
    """Internal: where and at which generation the training kills itself."""


class Statistics:
    """A running mean of the fitness, carried beside the state as front ends do."""

    def __init__(self) -> None:
        self.mean, self.count = np.float32(0), np.int64(0)

    def save(self) -> dict[str, Any]:
        """As arrays."""
        return {"count": np.asarray(self.count), "mean": np.asarray(self.mean)}

    def load(self, saved: Any) -> None:
        """From arrays."""
        self.count, self.mean = np.int64(saved["count"]), np.float32(saved["mean"])

    def __call__(self, state: eggroll.ESState, record: Record) -> None:
        """Callback of the training loop."""
        self.count = self.count + 1
        self.mean = np.float32(self.mean + (np.float32(record.mean_fitness) - self.mean) / np.float32(self.count))


class Net(nn.Module):
    """Two layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [4] to [1]."""
        return nn.Dense(1)(nn.tanh(nn.Dense(32)(x)))


def batch_of(generation: int) -> tuple[jax.Array, jax.Array]:
    """Inputs [64, 4] and targets [64, 1] of a generation."""
    x = jax.random.normal(jax.random.fold_in(jax.random.key(1), generation), (64, 4))
    return x, jnp.sin(x.sum(axis=1, keepdims=True))


def make(options: Any) -> tuple[eggroll.EvolutionStrategy, eggroll.ESState]:
    """Make the strategy, with its plan, and the initial state: the recipe of the journal."""

    def fitness(params: Any, batch: Any, key: jax.Array) -> jax.Array:
        x, y = batch
        return -jnp.mean(jnp.square(jax.vmap(lambda x: Net().apply(params, x))(x) - y))

    es = eggroll.EvolutionStrategy(fitness, population_size=64, sigma=0.05, optimizer=optax.adam(1e-2))
    state = es.init(Net().init(jax.random.key(0), jnp.zeros(4)), key=jax.random.key(2))
    es.plan(state, batch_of(0))
    return es, state


def work(config: Config, folder: Path) -> dict[str, Any]:
    """Train in `folder` from where it is to the end."""
    es, initial = make({})
    carried = Statistics()
    recipe, every = {"function": RECIPE, "options": {}}, config.checkpoint_every
    about = {"experiment": "faultdrill", "checkpoint_every": every}
    run = DurableRun(folder, es, initial, config=about, carried=carried, checkpoint_every=every, recipe=recipe)
    state, started_at = run.state, int(run.state.generation)
    print(f"started at {started_at}", flush=True)
    if config.die is not None:
        _arm(run, *config.die)
    if (left := config.generations - started_at) > 0:
        state, _ = train(es, state, batch_of, generations=left, callbacks=[carried, _tell], run_folder=folder, durable=run)
    run.close()
    return {"fingerprint": fingerprint((state.params, state.opt_state, carried.save())), "started_at": started_at}


def _tell(state: eggroll.ESState, record: Record) -> None:
    """Callback: the parent counts what was done, not what the files say."""
    print(record.generation, flush=True)


def _arm(run: DurableRun, moment: str, generation: int) -> None:
    """Let the run kill itself in the middle of a write."""
    journal, checkpoints = run._journal, run.checkpoints
    if moment == "journal":
        file = journal._file

        class HalfWritten:
            """Writes half of a record, and dies."""

            def write(self, data: bytes) -> int:
                if journal.next is not None and journal.next >= generation:
                    file.write(data[: len(data) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                return file.write(data)

            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

        journal._file = HalfWritten()  # type: ignore[assignment]
    else:
        save = checkpoints.save

        def save_and_die(state: eggroll.ESState, carried: Any = None, *, score: float | None = None) -> None:
            save(state, carried, score=score)  # it is written in the background
            if int(state.generation) >= generation:
                time.sleep(random.random() * 0.02)
                os.kill(os.getpid(), signal.SIGKILL)

        checkpoints.save = save_and_die  # type: ignore[method-assign]


@dataclasses.dataclass
class Drill:
    """What happened so far."""

    kills: dict[str, int]
    resumes: int = 0
    lost: int = 0  # generations that were reported done before a kill and done again after it
    done: int = 0  # generations reported

    def start(self, config: Config, folder: Path, die: tuple[str, int] | None, *, seconds: float | None) -> bool:
        """Run the training until it ends or is killed; tell whether it ended."""
        command = [sys.executable, "-m", "experiments.faultdrill", "--worker", str(folder)]
        command += ["--generations", str(config.generations), "--checkpoint-every", str(config.checkpoint_every)]
        command += [] if die is None else ["--die", die[0], str(die[1])]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        reported: int | None = None
        for line in process.stdout:
            if line.startswith("started at "):
                started = int(line.split()[-1])
                self.lost += max(0, self.done - started)
                self.resumes += started > 0
            elif line.strip().isdigit():
                reported = int(line) + 1
                if seconds is not None:
                    time.sleep(seconds)
                    process.send_signal(signal.SIGKILL)
                    seconds = None
        errors = process.communicate()[1].strip().splitlines() or ["it said nothing"]
        code = process.returncode
        # The last report may be of a generation that was being recorded when the kill came.
        self.done = max(self.done, 0 if reported is None else reported - 1)
        if code not in (0, -signal.SIGKILL):
            raise RuntimeError(f"the training ended with {code}: {errors[-1]}")
        return code == 0


def drill(config: Config, folder: Path) -> dict[str, Any]:
    """Kill and resume until the run is done; return the counts."""
    chance = random.Random(config.seed)
    moments = [MOMENTS[index % 3] for index in range(config.kills)]
    chance.shuffle(moments)
    state = Drill(dict.fromkeys(MOMENTS, 0))
    for index, moment in enumerate(moments):
        # Kills are spread over the run, so that some come early and some late.
        at = chance.randrange(*(config.generations * (index + part) // (config.kills + 1) for part in (0, 1)))
        die = None if moment == "training" else (moment, at)
        seconds = chance.random() * 0.5 if moment == "training" else None
        if state.start(config, folder, die, seconds=seconds):
            break
        state.kills[moment] += 1
        print(f"kill {index + 1}/{config.kills} in {moment}: {state.done} generations reported", flush=True)
    ended = state.start(config, folder, None, seconds=None)
    counts = {"kills": sum(state.kills.values()), "kills_in": state.kills, "resumes": state.resumes}
    return counts | {"lost_generations": state.lost, "ended": ended}


def damage(config: Config, folder: Path) -> dict[str, int]:
    """Damage copies of the journal and of the last checkpoint.

    Returns:
        Counts: "found"; "harmless", a checkpoint that came back whole because the file is not read any more; "silent", wrong
        data that came back without a word.
    """
    chance, counts = random.Random(config.seed + 1), {"found": 0, "harmless": 0, "silent": 0}
    initial = make({})[1]
    whole = _restored(folder, initial)
    for index in range(config.damages):
        copy = folder.parent / f"{folder.name}-damaged"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        which = ("journal", "checkpoint")[index % 2]
        last = max((copy / "checkpoints" / "states").iterdir(), key=lambda path: int(path.name))
        arrays = [path for path in last.rglob("d/*") if path.stat().st_size]
        files = [copy / "journal.bin"] if which == "journal" else arrays
        file = chance.choice(files)
        data = bytearray(file.read_bytes())
        place = chance.randrange(len(data))
        if index // 2 % 2:
            data[place] ^= 1 << chance.randrange(8)
        else:
            del data[place:]
        file.write_bytes(data)
        back = _restored(copy, initial) if which == "checkpoint" else None if _journal_damaged(copy) else "unnoticed"
        counts["found" if back is None else "harmless" if back == whole else "silent"] += 1
        shutil.rmtree(copy)
    return counts


def _journal_damaged(folder: Path) -> bool:
    try:
        reader = Reader(folder / "journal.bin")
        generations = sum(1 for _ in reader)
    except JournalError:
        return True
    whole = sum(1 for _ in Reader(folder.parent / folder.name.removesuffix("-damaged") / "journal.bin"))
    return reader.note is not None or generations < whole


def _restored(folder: Path, initial: Any) -> str | None:
    """The fingerprint of the last checkpoint as it comes back, None where it is refused."""
    checkpoints = Checkpoints(folder / "checkpoints", config=None)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(ValueError):  # orbax's abandoned tasks complain
        restored = checkpoints.restore(initial, Statistics().save())
        checkpoints.close()
        assert restored is not None
        state, carried = restored
        return fingerprint((state.params, state.opt_state, state.generation, carried))
    return None


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line; it ends with 1 where something was lost, differs or was not found."""
    config = tyro.cli(Config, args=arguments, prog="python -m experiments.faultdrill")
    if config.worker is not None:
        print_summary(work(config, Path(config.worker)))
        return
    root = run_folder(config.folder)
    for name in ("undisturbed", "killed"):
        shutil.rmtree(root / name, ignore_errors=True)
    start = time.perf_counter()
    expected = work(config, root / "undisturbed")["fingerprint"]
    summary = drill(config, root / "killed")
    summary["bit_equal"] = work(config, root / "killed")["fingerprint"] == expected
    damages = damage(config, root / "killed")
    summary |= {"damages": config.damages} | {f"damages_{name}": count for name, count in damages.items()}
    print_summary(summary | {"seconds": round(time.perf_counter() - start, 1)})
    sound = summary["bit_equal"] and summary["lost_generations"] == 0 and summary["damages_silent"] == 0
    if not (sound and summary["ended"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
