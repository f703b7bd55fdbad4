"""A damaged run folder: what can be rebuilt is kept, what is damaged is set aside, and the run resumes bit for bit."""

import dataclasses
import json
import random
import shutil

import jax
import numpy as np
import optax
import pytest

from eggroll.journal import Entry, JournalError, Reader, entries, records
from eggroll.journal import __main__ as __main__
from eggroll.journal.correction import correct
from eggroll.journal.lock import RunInUse, RunLock
from eggroll.journal.recovery import plan, survey
from eggroll.journal.repair import repair
from tests.eggroll.journal.test_journal import go, same, written

pytestmark = [
    pytest.mark.usefixtures("standard_promotion"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # tasks that orbax abandons on damaged files
]


ENTRY = Entry(3, 0.5, np.float32([1, -2, 3.5]), b"extra", 0.25)
HEADER_OF_TEST = records.Header(key=[], config={"sigma": 0.1}, plan=["w"], fingerprint="f", versions={})


def test_a_tolerant_reader_jumps_to_the_next_sound_record(tmp_path):
    path = written(tmp_path / "journal.bin")
    starts = places(path)
    overwrite(path, starts[1] + 20, b"garbage")
    overwrite(path, starts[3], b"garbage garbage")
    reader = Reader(path, tolerant=True)
    assert [entry.generation for entry in reader] == [0, 2, 4, 5]
    assert reader.gaps == [(starts[1], starts[2], 1, 2), (starts[3], starts[4], 3, 4)] and reader.note is None
    overwrite(path, 6, b"garbage")
    assert not Reader(path, tolerant=True).has_header and survey(path).gaps[0] == (0, starts[0], 0, 0)
    with pytest.raises(JournalError, match="header is damaged"):
        _ = Reader(path, tolerant=True).header


def places(path):
    """Start of every generation's record, and the end of the file."""
    reader = Reader(path)
    starts = [reader.end for _ in reader]
    return [*starts, path.stat().st_size]


def overwrite(path, start, content):
    data = bytearray(path.read_bytes())
    data[start : start + len(content)] = content
    path.write_bytes(data)


def flip(path, place, bit=3):
    overwrite(path, place, bytes([path.read_bytes()[place] ^ 1 << bit]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 11 generations with checkpoints at 4 and 8; tests copy it."""
    folder = tmp_path_factory.mktemp("whole")
    with jax.numpy_dtype_promotion("standard"):
        return folder / "run", go(folder / "run", 11)


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole[0], tmp_path / "run")


def resumes(folder, whole, generations=11):
    state, carried = go(folder, generations)
    same(state, whole[1][0])
    same(carried.save(), whole[1][1].save())


# --- the journal --------------------------------------------------------------------------------------------------------


def test_every_flipped_bit_of_a_record_is_flipped_back():
    whole = records.encode_header(HEADER_OF_TEST)
    for record, kind in ((whole, records.HEADER), (records._record(records.GENERATION, entries.encode(ENTRY)), 1)):
        for place in range(8 * len(record)):
            changed = bytearray(record)
            changed[place // 8] ^= 1 << place % 8
            assert correct(bytes(changed), magic=records.MAGIC, kinds=(kind,)) == record
    rng = random.Random(0)
    for _ in range(300):  # negative control: two bits
        changed = bytearray(record)
        for place in rng.sample(range(8 * len(record)), 2):
            changed[place // 8] ^= 1 << place % 8
        assert correct(bytes(changed), magic=records.MAGIC, kinds=(1,)) != record
    assert correct(record[:9], magic=records.MAGIC, kinds=(1,)) is None


@pytest.mark.parametrize("record", [-1, 0, 6, 9, 10], ids=["header", "first", "before", "after", "last"])
def test_one_flipped_bit_costs_nothing(run, whole, record, caplog):
    path = run / "journal.bin"
    before, starts = path.read_bytes(), [0, *places(path)]
    flip(path, starts[record + 1] + 40)
    resumes(run, whole)
    assert "one flipped bit of" in caplog.text and path.read_bytes() == before


@pytest.mark.parametrize("bit", range(0, 32, 5))
def test_a_flipped_bit_in_the_length_of_the_last_record_costs_nothing(tmp_path, bit):
    path = written(tmp_path / "journal.bin")
    before, start = path.read_bytes(), places(path)[-2]
    flip(path, start + 5 + bit // 8, bit % 8)
    assert "one flipped bit of generation 5" in repair(path)[0] and path.read_bytes() == before


@pytest.mark.slow
def test_a_dropped_tail_is_copied_aside(run, whole, caplog):
    path = run / "journal.bin"
    start, content = places(path)[10], path.read_bytes()
    path.write_bytes(content[: start + 30])
    resumes(run, whole)
    assert "journal.damaged-1.bin" in caplog.text
    assert (run / "journal.damaged-1.bin").read_bytes() == content[start : start + 30]
    path.write_bytes(content[: start + 30])
    flip(path, 40)  # the file is replaced
    resumes(run, whole)
    assert (run / "journal.damaged-2.bin").read_bytes() == content[start : start + 30]
    path.write_bytes(content[: start + 5])
    resumes(run, whole)
    assert not (run / "journal.damaged-3.bin").exists()


def test_damage_before_the_checkpoint_costs_the_replay(run, whole, caplog):
    path = run / "journal.bin"
    starts = places(path)
    damaged = path.read_bytes()[: starts[3] + 20] + b"garbage" + path.read_bytes()[starts[3] + 27 :]
    path.write_bytes(damaged)
    resumes(run, whole)
    assert caplog.text.count("generation 3 of") == 1 and "cannot be replayed any more" in caplog.text
    assert (run / "journal.damaged-1.bin").read_bytes() == damaged[starts[3] : starts[4]]
    caplog.clear()
    resumes(run, whole)
    assert not caplog.text and not (run / "journal.damaged-2.bin").exists()
    with pytest.raises(SystemExit, match="generation 3 is missing"):
        __main__.main(["replay", str(run), "--trust"])


def test_a_damaged_header_is_written_again(run, whole, caplog):
    path = run / "journal.bin"
    header = Reader(path).header
    overwrite(path, 40, b"garbage")
    resumes(run, whole)
    assert Reader(path).header == header and "damaged bytes" in caplog.text and "restored from its copy" in caplog.text
    overwrite(path, 40, b"garbage")
    with pytest.raises(ValueError, match="the optimizer is not the same"):
        go(run, 12, options={"optimizer": optax.sgd(0.1)})
    resumes(run, whole)


@pytest.mark.parametrize("where", ["after", "missing"])
def test_damage_after_the_checkpoint_is_repaired_by_hand(run, whole, where, capsys):
    path, starts = run / "journal.bin", places(run / "journal.bin")
    if where == "after":
        overwrite(path, starts[9] + 20, b"garbage")
    else:
        path.unlink()
    before = path.read_bytes() if path.exists() else b""
    with pytest.raises(JournalError, match=f"python -m eggroll.journal repair {run}"):
        go(run, 11)
    assert not path.exists() or path.read_bytes() == before
    __main__.main(["repair", str(run)])
    said = capsys.readouterr().out
    if where == "after":
        assert "generations from 9 on cannot be rebuilt" in said
        assert (run / "journal.damaged-1.bin").read_bytes() == before[starts[9] :] and path.read_bytes() == before[: starts[9]]
    resumes(run, whole)
    __main__.main(["repair", str(run)])
    assert "nothing was changed" in capsys.readouterr().out


@pytest.mark.parametrize("repairs_first", [False, True])
def test_a_repair_does_not_rely_on_a_checkpoint_with_damaged_arrays(run, whole, repairs_first):
    path, starts = run / "journal.bin", places(run / "journal.bin")
    overwrite(path, starts[6] + 20, b"garbage")
    for data in (run / "checkpoints/states/8/state").rglob("d/*"):
        data.write_bytes(bytes(data.stat().st_size))
    if repairs_first:
        repair(path)
    else:
        with pytest.raises(JournalError, match="after the last sound checkpoint, of generation 4"):
            go(run, 11)
        assert "generations from 6 on cannot be rebuilt" in " ".join(repair(path))
    if repairs_first:
        with pytest.raises(JournalError, match=r"after the last sound checkpoint, of generation 4|is missing"):
            go(run, 11)
        repair(path)
    resumes(run, whole)


def test_a_journal_cut_before_the_checkpoint_continues_from_it(run, whole, caplog):
    path = run / "journal.bin"
    path.write_bytes(path.read_bytes()[: places(path)[5] + 7])
    resumes(run, whole)
    assert "generations 5 to 7 of" in caplog.text
    assert [entry.generation for entry in Reader(path, tolerant=True)] == [0, 1, 2, 3, 4, 8, 9, 10]


def test_a_repair_waits_for_nobody_and_needs_a_run(run, tmp_path):
    lock = RunLock(run)
    with pytest.raises(RunInUse):
        repair(run / "journal.bin")
    lock.release()
    (tmp_path / "empty").mkdir()
    with pytest.raises(JournalError, match="neither a journal nor a sound checkpoint"):
        repair(tmp_path / "empty" / "journal.bin")
    with pytest.raises(JournalError, match="there is no run"):
        repair(tmp_path / "none" / "journal.bin")
    assert not plan(run / "journal.bin", covered=8).writes


# --- checkpoints and metrics --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["metrics/metrics", "check/metadata", "_CHECKPOINT_METADATA", "state/_METADATA"])
@pytest.mark.parametrize("how", ["garbage", "key", "missing"])
def test_a_checkpoint_with_damaged_json_is_set_aside(run, whole, name, how, caplog):
    path = run / "checkpoints/states/8" / name
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(b"\xff" + content if how == "garbage" else content.replace(b'"', b'"x', 1))
    resumes(run, whole)
    assert (run / "checkpoints/damaged/8-1").is_dir() or how == "key"
    if how != "key":
        assert "checkpoint of generation 8" in caplog.text and "an earlier one is used" in caplog.text


def test_a_damaged_config_is_written_again(run, whole, caplog):
    path = run / "checkpoints/config.json"
    before = path.read_bytes()
    for damaged in (b"\xff", before.replace(b'"a": 1', b'"a": 3'), b"", b"[1]"):
        path.write_bytes(damaged)
        resumes(run, whole)
        assert path.read_bytes() == before and "It was written again" in caplog.text
        caplog.clear()
    path.write_bytes(b"{")
    overwrite(run / "journal.bin", 40, b"garbage")
    (run / "journal.header.json").unlink()
    with pytest.raises(ValueError, match=r"config.json is not valid JSON: .*The journal cannot tell whose run it is either"):
        go(run, 11)


def test_a_config_without_a_checksum_is_read(run, whole):
    (run / "checkpoints/config.json").write_text(json.dumps({"a": 1}))
    resumes(run, whole)


# --- what a recipe may import -------------------------------------------------------------------------------------------


def test_a_recipe_of_another_module_is_called_only_when_it_is_named_again(run, capsys):
    for command in ("replay", "verify"):
        with pytest.raises(
            SystemExit, match=r"would import tests.eggroll.journal.test_journal and call .*:make: repeat .*--import"
        ):
            __main__.main([command, str(run)])
        with pytest.raises(SystemExit, match="would import"):
            __main__.main([command, str(run), "--import", "tests.other"])
        __main__.main([command, str(run), "--import", "tests.eggroll.journal.test_journal"])
        __main__.main([command, str(run), "--trust"])
    for arguments in (["inspect", str(run), "--trust"], ["repair", str(run), "--import", "x"]):
        with pytest.raises(SystemExit, match=r"has no effect with .*: it belongs to replay and verify"):
            __main__.main(arguments)


def test_a_recipe_of_eggroll_is_one_of_its_recipes(tmp_path):
    for function in ("eggroll.experiments.common.run:run_folder", "eggroll.files:sync", "eggroll.journal.lock:os"):
        path = tmp_path / function.replace(":", "-")
        header = dataclasses.replace(HEADER_OF_TEST, recipe={"function": function, "options": str(tmp_path / "made/x")})
        records.Writer(path, header).close()
        with pytest.raises(SystemExit, match=f"names {function}, which is no recipe"):
            __main__.main(["replay", str(path)])
    assert not (tmp_path / "made").exists()
