"""metrics.jsonl: damaged lines are dropped with one warning, the others kept."""

import json
import math
import random

import pytest

from eggroll.runs.metrics import append_line, open_metrics, read_metrics, seal
from eggroll.runs.record import Record, read_records

ROWS = [{"generation": g, "mean_fitness": 0.25 * g, "text": "\u00e9"} for g in range(5)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(seal(json.dumps(row)) for row in ROWS))
    return tmp_path


def test_lines_are_json_and_read_back(folder, caplog):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [set(json.loads(line)) - set(ROWS[0]) for line in lines] == [{"crc32"}] * 5
    assert read_metrics(folder) == ROWS and not caplog.text
    assert read_metrics(folder / "none") == []


def test_every_flipped_bit_drops_at_most_two_lines_and_changes_none(folder, caplog):
    path = folder / "metrics.jsonl"
    whole, chance = path.read_bytes(), random.Random(0)
    for place in chance.sample(range(8 * len(whole)), 600):
        changed = bytearray(whole)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        caplog.clear()
        read = [{name: row.get(name) for name in ROWS[0]} for row in read_metrics(folder)]
        assert len(read) >= 3 and all(row in ROWS for row in read)
        assert caplog.text.count("WARNING") == (len(read) < 5 and changed.endswith(b"\n"))


def test_a_continued_run_keeps_the_sound_lines(folder, caplog):
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(
        lines[0] + b"\xff\xfe\n[1]\n" + lines[1].replace(b"0.25", b"0.75") + lines[2] + lines[3] + b'{"generation": 4'
    )
    open_metrics(folder, 3).close()
    assert path.read_bytes() == lines[0] + lines[2]
    assert caplog.text.count("WARNING") == 1 and "3 damaged lines were dropped, the first is line 2" in caplog.text


def test_lines_of_earlier_versions_have_no_checksum(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"generation": 0}\n{"generation": 1}')
    assert [row["generation"] for row in read_metrics(tmp_path)] == [0, 1]


def test_records_read_back_as_they_were_written(tmp_path):
    numbers = dict.fromkeys(("sigma", "best_fitness", "tied_pairs", "effective_rank", "gradient_norm", "moved"), 0.1)
    numbers |= dict.fromkeys(("std_fitness", "pair_correlation", "update_over_sigma", "update_over_weights"), 1 / 3)
    numbers |= {"weight_norm": 2.0, "seconds": 1e-3, "members_per_second": 8e3}
    about = {"invalid": 0, "kept": 0, "skipped": False, "leaf_norms": {"w": 0.7, "b": 0.1}, "extra": {"held_out": 3.0}}
    records = [Record(generation=g, mean_fitness=-g / 7, **numbers, **about) for g in range(3)]
    for record in records:
        append_line(tmp_path, record.generation, record.to_json())
    assert read_records(tmp_path) == records
    append_line(tmp_path, 3, '{"generation": 2, "validation_accuracy": 0.5}')  # of a front end, and of no generation
    assert read_records(tmp_path) == records
    append_line(tmp_path, 3, '{"generation": 3, "sigma": 0.1, "mean_fitness": null}')  # of an earlier version: fewer numbers
    last = read_records(tmp_path)[-1]
    assert last.generation == 3 and math.isnan(last.mean_fitness) and math.isnan(last.weight_norm)
    assert read_records(tmp_path / "none") == []
