"""One process of a run of several; `test_processes.py` starts them with `eggroll.launch` and judges what they leave.

python tests/process_runs.py FOLDER CHECK
"""

import json
import os
import signal
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import optax

import eggroll
from eggroll import zo
from eggroll.devices import processes
from eggroll.journal.fingerprint import fingerprint
from eggroll.journal.lock import RunLock
from eggroll.runs.durable import DurableRun
from eggroll.runs.training import train

FOLDER = Path(sys.argv[1])
PARAMS = {"w": 0.3 * np.ones((4, 8), np.float32), "b": np.zeros(8, np.float32)}
CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def batch_of(generation):
    return jax.random.normal(jax.random.fold_in(jax.random.key(2), generation), (8, 4))


def model(params, x):
    return jnp.tanh(x @ params["w"] + params["b"])


def fitness(params, batch, key):
    return -jnp.mean((model(params, batch) - 1.0) ** 2)


def recurrent(params, batch, key, memory):
    memory = memory + batch.mean(axis=0) @ params["w"]
    return jnp.sum(memory + params["b"]), memory


def strategy(function=fitness, **options):
    mesh = jax.make_mesh((jax.device_count(),), ("population",))
    options = dict(population_size=24, sigma=0.1, optimizer=optax.sgd(0.5, momentum=0.9), mesh=mesh) | options
    return eggroll.EvolutionStrategy(function, **options)


def go(name, generations, function=fitness, *, member_state=None, callbacks=(), every=2, **options):
    """Train from where the folder is; return what every process has."""
    es = strategy(function, **options)
    return es, *_train(name, generations, es, member_state, callbacks, every)


def _train(name, generations, es, member_state=None, callbacks=(), every=2):
    more = {} if member_state is None else {"member_state": member_state}
    initial = es.init(PARAMS, key=jax.random.key(0), **more)
    es.plan(initial, batch_of(0))
    run = DurableRun(FOLDER / name, es, initial, config={}, checkpoint_every=every)
    state, left, history = run.state, generations - int(run.state.generation), []
    if left > 0:
        more = {"callbacks": callbacks, "run_folder": FOLDER / name, "durable": run}
        state, history = train(es, state, batch_of, generations=left, **more)
    run.close()
    return state, history


@check
def same():
    """Numbers that must not depend on the number of processes."""
    es, state, history = go("run", 5, shard_optimizer=True, population_size=22)
    _, again, nothing = go("run", 5, shard_optimizer=True, population_size=22)
    _, memory, _ = go("memory", 3, recurrent, member_state=jnp.ones(8), shaping="z_score")
    outputs = es.ask(state).apply(model, batch_of(9))
    told, _ = es.tell(eggroll.copy_state(state), np.asarray(outputs).mean(axis=(1, 2)))
    tuner = zo.fzoo(lambda params, batch, key: -fitness(params, batch, key), learning_rate=0.05, sigma=0.05, mesh=es.mesh)
    tuned, _ = _train("zo", 4, tuner, every=2)
    from tests.zo.tiny_blocks import BATCH, PIECES, init

    away = zo.Offload(zo.mezo(PIECES, learning_rate=0.05, sigma=0.05, directions=3, mesh=es.mesh))
    moved = away.init(init(), key=jax.random.key(9))
    for _ in range(3):
        moved, _ = away.step(moved, BATCH)
    moved = away.parameters(away.flush(moved))
    sick = strategy(lambda params, batch, key: jnp.nan * fitness(params, batch, key))
    _train("sick", 2, sick, every=5)
    again_sick, _ = _train("sick", 3, sick, every=5)  # replays generations that were skipped
    arrays = {"embed": moved["resident"]["embed"], "block": moved["blocks"]["w"]}
    arrays |= {"tuned": tuned.params["w"], "sick": again_sick.params["w"], "least": processes.minimum_over_processes(3 << 30)}
    arrays |= {"mean": [record.mean_fitness for record in history], "memory": processes.gather(memory.member_state)}
    arrays |= {"w": state.params["w"], "b": state.params["b"], "outputs": outputs, "told": told.params["w"]}
    arrays["momentum"] = processes.gather(jax.tree.leaves(state.opt_state)[1])
    arrays["resumed"] = fingerprint(again) == fingerprint(state) and not nothing
    if processes.is_first():
        np.savez(FOLDER / "same.npz", **{name: np.asarray(value) for name, value in arrays.items()})


@check
def killed():
    """Process 1 dies in generation 5 of 9, once, unless it is asked not to."""

    def die(state, record):
        if record.generation == 5 and jax.process_index() == 1 and (FOLDER / "deadly").exists():
            (FOLDER / "deadly").unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    _, state, history = go("killed", 9, callbacks=[die], every=3)
    if processes.is_first():
        found = {"fingerprint": fingerprint(state.params), "generations": len(history)}
        (FOLDER / "killed.json").write_text(json.dumps(found))


@check
def different():
    """What is said when processes bring different keys."""
    try:
        strategy().init(PARAMS, key=jax.random.key(jax.process_index()))
        message = "none"
    except ValueError as error:
        message = str(error)
    (FOLDER / f"different-{jax.process_index()}").write_text(message)


@check
def refused():
    """What every process is told where the first one alone finds the fault; afterwards they are still in step."""
    told = []

    def note(run):
        try:
            run()
            told.append("nothing")
        except (ValueError, OSError) as error:
            told.append([type(error).__name__, str(error)])

    def damage():
        journal = FOLDER / "run" / "journal.bin"
        content = bytearray(journal.read_bytes())
        last = content.rfind(b"EGJ1")
        content[last - 40 : last] = bytes(40)  # of generation 3, after the checkpoint; generation 4 follows
        journal.write_bytes(content)
        (FOLDER / "figures" / "metrics.jsonl").mkdir(parents=True)
        return RunLock(FOLDER / "run")

    go("run", 5, every=3)
    lock = processes.first_does(damage)
    note(lambda: go("run", 6))  # in use
    del lock
    note(lambda: go("run", 6))  # damaged
    note(lambda: go("figures", 1))  # a file that cannot be written
    note(lambda: processes.first_does(lambda: np.zeros(3).reshape(2)))
    note(lambda: go("new", 1))
    (FOLDER / f"told-{jax.process_index()}.json").write_text(json.dumps(told))


@check
def alone():
    """The first process fails in a generation, where the others wait for it."""

    def fail(state, record):
        if processes.is_first():
            raise OSError(28, "No space left on device", "metrics.jsonl")

    go("alone", 3, callbacks=[fail])


if __name__ == "__main__":
    processes.join()
    CHECKS[sys.argv[2]]()
