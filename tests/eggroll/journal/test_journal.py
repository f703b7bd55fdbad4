"""The journal and the durable run: records are read back bit for bit, damage is named, other runs are refused."""

import dataclasses
import gc
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import eggroll
from eggroll.journal import Entry, Header, JournalError, Reader, Writer, entries, make_header, records, replay
from eggroll.journal import __main__ as __main__
from eggroll.journal.checkpoint import Checkpoints
from eggroll.runs.durable import DurableRun
from eggroll.state import copy_state
from tests.tables import by_default, slow

pytestmark = pytest.mark.usefixtures("standard_promotion")  # optax.adam relies on the former
PARAMS = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}
ADAM = optax.adam(1e-2)  # one object: strategies that are made again are equal, and compiled once
HEADER = Header(key=["threefry2x32", [0, 1]], config={"sigma": 0.1}, plan=["w"], fingerprint="f", versions={"jax": "x"})
ENTRIES = [Entry(g, 0.1 + g, np.float32([g, -1.5, 0.25, np.nan, 3]), bytes([g] * g), g / 4) for g in range(6)]


def fitness(params, batch, key):
    return -jnp.mean((jnp.tanh(batch @ params["w"]) + params["b"] - batch[:, :1]) ** 2)


def batch_of(generation):
    return jax.random.normal(jax.random.key(generation), (6, 4))


def make(options=None):
    """Make a strategy with its plan, and the initial state: the recipe of the journal."""
    options = dict(population_size=16, sigma=0.1) | (options or {})
    options.setdefault("optimizer", ADAM)
    es = eggroll.EvolutionStrategy(fitness, **options)
    dtype = jnp.bfloat16 if es.precision == "stochastic" else jnp.float32
    state = es.init(jax.tree.map(lambda leaf: leaf.astype(dtype), PARAMS), key=jax.random.key(3))
    es.plan(state, batch_of(0))
    return es, state


RECIPE = {"function": "tests.eggroll.journal.test_journal:make", "options": {}}


OWN = ("--import", "tests.eggroll.journal.test_journal")  # the module of the recipe


class Counter:
    """Carried with the state."""

    def __init__(self):
        self.total, self.mean = 0, np.zeros(3, np.float32)

    def save(self):
        return {"mean": np.asarray(self.mean), "total": np.int64(self.total)}

    def load(self, saved):
        self.total, self.mean = int(saved["total"]), saved["mean"]

    def __call__(self, state, record):
        self.total += record.generation
        self.mean = self.mean * np.float32(0.9) + np.float32(record.mean_fitness)


def go(folder, generations, *, options=None, every=4, config=None):
    """Resume training in a folder; return the state on disk and what is carried."""
    (es, initial), (_, again) = make(options), make(options)  # the run consumes its initial state
    carried = Counter()
    more = {"config": config or {"a": 1}, "carried": carried, "checkpoint_every": every, "recipe": RECIPE}
    run = DurableRun(folder, es, initial, **more)
    if generations > int(run.state.generation):
        left = generations - int(run.state.generation)
        options = {"callbacks": [carried], "run_folder": folder, "durable": run}
        eggroll.train(es, run.state, batch_of, generations=left, **options)
    run.close()
    state = DurableRun(folder, es, again, **more)  # read back from disk
    state.close()
    return state.state, carried


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes() if not hasattr(a, "_impl") else True


def written(path, entries=ENTRIES):
    writer = Writer(path, HEADER)
    for entry in entries:
        writer.append(entry)
    writer.close()
    return path


def equal(entry, other):
    numbers = entry.generation == other.generation and np.float32(entry.sigma) == np.float32(other.sigma)
    numbers = numbers and entry.mean_fitness == other.mean_fitness
    return numbers and entry.extra == other.extra and entry.coefficients.tobytes() == other.coefficients.tobytes()


# --- the file -----------------------------------------------------------------------------------------------------------


def test_records_are_read_back(tmp_path):
    reader = Reader(written(tmp_path / "journal.bin"))
    assert reader.header == HEADER and all(map(equal, reader, ENTRIES)) and reader.note is None


@pytest.mark.parametrize("version", [2, 3])
def test_a_file_of_an_earlier_format_is_continued_in_this_one(tmp_path, version):
    """Nothing of the new generations is dropped, and an earlier library refuses the file."""
    path, old = tmp_path / "journal.bin", [entry._replace(mean_fitness=None) for entry in ENTRIES[:3]]
    writer = Writer(path, dataclasses.replace(HEADER, version=version))
    for entry in old:
        writer.append(entry)
    writer.close()
    sums = entries.Sums(np.arange(3, dtype=np.uint32), np.full(3, 2**32 - 1, np.uint32), True, 2**32 - 1)
    new = [entry._replace(sums=sums._replace(before=None) if entry.generation > 3 else sums) for entry in ENTRIES[3:]]
    for entry in new:
        writer = Writer(path, HEADER)
        writer.append(entry)
        writer.close()
    reader = Reader(path)
    assert all(map(equal, reader, [*old, *new])) and reader.header.version == records.READABLE[-1] == 4
    for entry, written in zip([*reader][3:], new, strict=True):
        assert all(map(np.array_equal, entry.sums, written.sums)) and len(entry.sums) == len(written.sums)
    assert json.loads((tmp_path / "journal.header.json").read_text())["version"] == 4


@pytest.mark.parametrize("pairs", [1, 4, 5, 6, 1000])
def test_three_values_take_a_fifth_of_a_byte(pairs):
    rng = np.random.default_rng(pairs)
    values = rng.choice(np.float32([-1.0, 0.0, 1.0]), size=pairs)
    payload = entries.encode(Entry(7, 0.5, values, b"xyz"))
    assert len(payload) == entries._ENTRY.size + 4 + -(-pairs // 5) + 3
    back = entries.decode(payload)
    assert back.extra == b"xyz" and back.coefficients.tolist() == values.tolist()
    many = entries.encode(Entry(7, 0.5, np.arange(pairs + 2, dtype=np.float32), b""))
    assert len(many) == entries._ENTRY.size + 4 * (pairs + 2)


def test_a_truncation_loses_at_most_the_truncated_record(tmp_path):
    path = written(tmp_path / "journal.bin")
    whole, starts = path.read_bytes(), []
    reader = Reader(path)
    for _ in reader:
        starts.append(reader.end)
    starts.append(len(whole))
    for size in range(starts[0], len(whole)):
        path.write_bytes(whole[:size])
        reader = Reader(path)
        expected = sum(end <= size for end in starts[1:])
        assert sum(1 for _ in reader) == expected
        assert (reader.note is None) == (size in starts)
        writer = Writer(path, HEADER)  # continues after the last sound record
        writer.append(ENTRIES[expected])
        writer.close()
        assert path.read_bytes() == whole[: starts[expected + 1]]
    for size in range(starts[0]):
        path.write_bytes(whole[:size])
        with pytest.raises(JournalError, match="is not a journal, or its header is damaged"):
            Reader(path)


def test_every_flipped_bit_is_detected(tmp_path):
    path = written(tmp_path / "journal.bin", ENTRIES[:3])
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        try:
            reader = Reader(path)
            entries = list(reader)
        except JournalError as error:
            assert "damaged" in str(error)
        else:  # in the last record: dropped, with a note
            assert len(entries) == 2 and "generation 2, is incomplete and was dropped" in reader.note


def test_damage_in_the_middle_names_the_generation_and_is_not_overwritten(tmp_path):
    path = written(tmp_path / "journal.bin")
    damaged = path.read_bytes().replace(np.float32(ENTRIES[2].sigma).tobytes(), b"\0\0\0\0")
    path.write_bytes(damaged)
    with pytest.raises(JournalError, match="damaged at generation 2"):
        Writer(path, HEADER)
    assert path.read_bytes() == damaged


def test_a_full_disk_keeps_earlier_records(tmp_path, monkeypatch):
    path = tmp_path / "journal.bin"
    writer = Writer(path, HEADER)
    writer.append(ENTRIES[0])
    before, file = path.read_bytes(), writer._file

    class Full:
        """A file whose disk is full after ten bytes."""

        def write(self, data):
            file.write(data[:10])
            raise OSError(28, "No space left on device")

        def __getattr__(self, name):
            return getattr(file, name)

    writer._file = Full()
    with pytest.raises(OSError, match="No space left"):
        writer.append(ENTRIES[1])
    assert path.read_bytes() == before
    writer._file = file
    writer.append(ENTRIES[1])
    writer.close()
    assert len(list(Reader(path))) == 2


def test_generations_are_consecutive(tmp_path):
    writer = Writer(tmp_path / "journal.bin", HEADER)
    writer.append(ENTRIES[0])
    with pytest.raises(JournalError, match="continues with generation 1, got 3"):
        writer.append(ENTRIES[3])
    writer.close()


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("key", ["threefry2x32", [5, 5]], "key differs"),
        ("config", {"sigma": 0.2}, "config sigma is 0.1, not 0.2"),
        ("plan", ["v"], "plan has the row .*, not the row 'v'"),
        ("fingerprint", "g", "fingerprint differs"),
    ],
)
def test_a_journal_of_another_run_is_refused(tmp_path, field, value, words):
    path = written(tmp_path / "journal.bin")
    before = path.read_bytes()
    with pytest.raises(JournalError, match=words):
        Writer(path, dataclasses.replace(HEADER, **{field: value}))
    Writer(path, dataclasses.replace(HEADER, versions={"jax": "another"}, recipe={"function": "a:b"})).close()
    assert path.read_bytes() == before


def test_another_version_and_a_missing_file_are_refused(tmp_path):
    Writer(tmp_path / "a", dataclasses.replace(HEADER, version=9)).close()
    with pytest.raises(JournalError, match="has version 9 of the format; this library reads 2, 3, 4"):
        Reader(tmp_path / "a")
    with pytest.raises(JournalError, match="there is no journal"):
        Reader(tmp_path / "b")


# --- replay -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shaping": "pair_sign", "perturbation": eggroll.LowRank(rank=2), "noise_reuse": 3},
        slow({"sigma": optax.exponential_decay(0.1, 1, 0.9), "perturbation": eggroll.Dense()}),
        slow({"optimizer": optax.chain(optax.sgd(1e-2), optax.contrib.reduce_on_plateau(patience=1, rtol=0.5))}),
    ],
    ids=["default", "sign", "schedule", "plateau"],
)
@pytest.mark.optimized
def test_replay_is_the_run_bit_for_bit(options):
    es, state = make(options)
    entries, start = [], copy_state(state)
    for generation in range(5):
        if generation == 3 and not callable(es.sigma):
            state = state._replace(sigma=jnp.float32(0.05))
        state, metrics = es.step(state, batch_of(generation))
        mean = float(metrics.mean_fitness)
        entries.append(Entry(generation, float(metrics.sigma), np.asarray(metrics.coefficients), b"", mean))
    again, replayed = make(options)
    same(replay(again, copy_state(replayed), iter(entries)), state)
    told, asked = start, make(options)[0]
    for generation in range(3):  # ask and tell give the same bits as well
        outputs = es.step(copy_state(told), batch_of(generation))[1].fitness
        told, _ = asked.tell(told, outputs)
    same(told, replay(again, copy_state(replayed), iter(entries), until=3))
    with pytest.raises(JournalError, match="generation 9 is not in the journal, which ends at 5"):
        replay(again, copy_state(replayed), iter(entries), until=9)
    with pytest.raises(JournalError, match="cannot replay to generation -1: the state is at 0"):
        replay(again, copy_state(replayed), iter(entries), until=-1)
    with pytest.raises(JournalError, match="starts with generation 2, after the state's 0"):
        replay(again, replayed, iter(entries[2:]))


def test_a_generation_without_a_finite_member_replays_as_one_that_changed_nothing():
    es, state = make()
    state, metrics = es.step(state, jnp.full((6, 4), jnp.nan))
    assert metrics.skipped and np.isnan(metrics.coefficients).all()
    replayed = es.replay(make()[1], metrics.coefficients)
    same(replayed, state)
    same(replayed.params, PARAMS)
    with pytest.raises(ValueError, match=r"coefficients must have shape \(8,\), got \(3,\)"):
        es.replay(state, jnp.zeros(3))


# --- the durable run ----------------------------------------------------------------------------------------------------


def test_a_run_resumes_from_any_generation(tmp_path, caplog):
    whole, counted = go(tmp_path / "whole", 11)
    for generations in (0, 3, 4, 9, 11):  # before, on and after a checkpoint
        state, carried = go(tmp_path / "parts", generations)
        assert int(state.generation) == generations
    same(state, whole)
    same(carried.save(), counted.save())
    assert "an earlier one is used" not in caplog.text
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    assert len(lines[0]) == len(lines[1]) == 11


def test_lines_of_a_lost_continuation_are_dropped(tmp_path):
    go(tmp_path, 3)
    metrics = tmp_path / "metrics.jsonl"
    first = metrics.read_text()
    metrics.write_text(first + '{"generation": 3}\n{"generation": 7}\n{"genera')
    go(tmp_path, 5)
    assert metrics.read_text().startswith(first) and len(metrics.read_text().splitlines()) == 5


@pytest.mark.parametrize("damage", by_default(["truncate", "flip"], "flip"))
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # tasks that orbax abandons on damaged files
def test_a_damaged_checkpoint_is_detected_and_skipped(tmp_path, damage, caplog):
    whole, _ = go(tmp_path / "whole", 10)
    go(tmp_path / "run", 10)
    files = sorted((tmp_path / "run/checkpoints/states/8").rglob("*"), key=lambda f: f.stat().st_size if f.is_file() else -1)
    data = files[-1].read_bytes()  # the largest file holds the arrays
    flipped = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 0xFF]) + data[len(data) // 2 + 1 :]
    files[-1].write_bytes(data[: len(data) // 2] if damage == "truncate" else flipped)
    state, _ = go(tmp_path / "run", 10)
    same(state, whole)
    assert "the checkpoint of generation 8" in caplog.text and "an earlier one is used" in caplog.text
    gc.collect()  # the abandoned tasks are this test's, not those of one that comes later


def test_an_optimizer_that_reads_the_fitness_resumes_bit_for_bit(tmp_path):
    options = {"optimizer": optax.chain(optax.sgd(1e-2), optax.contrib.reduce_on_plateau(patience=1, rtol=0.5))}
    whole, _ = go(tmp_path / "whole", 6, options=options)
    go(tmp_path / "parts", 3, options=options)
    parts, _ = go(tmp_path / "parts", 6, options=options)
    same(parts, whole)
    assert float(whole.opt_state[1].scale) < 1


def test_other_settings_are_refused_by_name(tmp_path):
    go(tmp_path, 2, config={"lr": 1, "b": 2})
    with pytest.raises(ValueError, match=r"other settings: lr \(was 1, is 3\), c \(was None, is 4\)"):
        go(tmp_path, 4, config={"lr": 3, "b": 2, "c": 4})
    with pytest.raises(ValueError, match="config population_size is 16, not 32"):
        go(tmp_path, 4, options={"population_size": 32}, config={"lr": 1, "b": 2})


def as_written_before_updates_had_a_version(path):
    """Rewrite the header of a journal without the field."""
    fields = dataclasses.asdict(Reader(path).header)
    del fields["update"]
    with open(path, "rb") as file:
        records._read_record(file, path.stat().st_size)
        rest = file.read()
    path.write_bytes(records._record(records.HEADER, json.dumps(fields).encode()) + rest)


@pytest.mark.parametrize("precision", ["master", "stochastic"])
def test_a_journal_of_an_earlier_update_continues_where_it_is_the_same_up_to_rounding(tmp_path, precision):
    options = {"precision": precision}
    go(tmp_path, 2, options=options)
    as_written_before_updates_had_a_version(tmp_path / "journal.bin")
    assert Reader(tmp_path / "journal.bin").header.update == 1
    if precision == "master":
        state, _ = go(tmp_path, 3, options=options)
        assert state.generation == 3
        with pytest.raises(SystemExit, match=r"version 1 of the update, whose parameters .* up to rounding, not bit for bit"):
            __main__.main(["verify", str(tmp_path), *OWN])
    else:
        with pytest.raises(JournalError, match="version 1 of the update, whose stochastic rounding"):
            go(tmp_path, 3, options=options)


def test_a_missing_journal_is_refused(tmp_path):
    go(tmp_path, 5)
    os.remove(tmp_path / "journal.bin")
    with pytest.raises(JournalError, match=r"has checkpoints, but its journal.bin is missing"):
        go(tmp_path, 8)


def test_checkpoints_keep_the_last_and_the_best(tmp_path):
    _, state = make()
    checkpoints = Checkpoints(tmp_path, config={}, keep=2)
    for generation, score in enumerate([None, 9.0, 3.0, None, 1.0]):
        checkpoints.save(state._replace(generation=jnp.int32(generation)), score=score)
    checkpoints.wait()
    assert checkpoints.generations == [1, 3, 4]
    checkpoints.close()


# --- the command line ---------------------------------------------------------------------------------------------------


def test_command_line(tmp_path, capsys):
    state, _ = go(tmp_path, 10)
    __main__.main(["inspect", str(tmp_path)])
    assert "10 generations" in capsys.readouterr().out
    __main__.main(["replay", str(tmp_path), "--generation", "10", *OWN])
    with np.load(tmp_path / "replayed-10.npz") as arrays:
        for name, leaf in state.params.items():
            assert arrays[name].tobytes() == np.asarray(leaf).tobytes()
    __main__.main(["verify", str(tmp_path), *OWN])
    assert "2 checkpoints are rebuilt bit for bit" in capsys.readouterr().out
    go(tmp_path / "short", 2)
    for arguments, words in (
        (["inspect", "nowhere"], "there is no journal"),
        (["replay", tmp_path, "--generation", "12", *OWN], "12 is not"),
        (["verify", tmp_path / "short", *OWN], "has no checkpoint to compare with"),
    ):
        with pytest.raises(SystemExit, match=f"error: .*{words}"):
            __main__.main([str(argument) for argument in arguments])


def test_headers_tell_runs_apart():
    es, state = make()
    header = make_header(es, state)
    header.check(make_header(*make()))
    with pytest.raises(JournalError, match="fingerprint differs"):
        header.check(make_header(es, state._replace(params=jax.tree.map(lambda x: x + 1, state.params))))
    assert make_header(*make({"shaping": lambda f: f})).config["shaping"] == "function <lambda>"
