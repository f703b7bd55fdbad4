"""The scaling study: its table, how far the loss falls with the population, what it runs and what it refuses."""

import json
import sys
from contextlib import nullcontext

import pytest

from eggroll.experiments.common.run import write_json
from eggroll.experiments.egg import suite
from eggroll.experiments.egg.suite import Config, make_table, octaves


def rows(*bits):
    """Of populations 64, 128, ...; each with the bits of its seeds."""
    return [
        {
            "population": 64 << step,
            "group": 4 << step,
            "bits": sum(own) / len(own),
            "deviation": 0.5,
            "by_seed": own,
            "seconds": 1.0,
        }
        for step, own in enumerate(bits)
    ]


def test_octaves_count_the_longest_fall():
    falling = rows([5.0, 5.2], [4.0, 4.2], [3.0, 3.2])
    assert octaves(falling) == octaves(falling, every_seed=True) == 2
    one_seed_rises = rows([5.0, 5.2], [4.0, 4.2], [3.0, 4.3])
    assert octaves(one_seed_rises) == 2 and octaves(one_seed_rises, every_seed=True) == 1
    assert octaves(rows([5.0], [6.0], [5.0], [4.0], [4.0])) == 2
    assert octaves(rows([5.0])) == octaves([]) == octaves(rows([5.0], [5.0])) == 0


def test_table():
    assert make_table(rows([5.0, 5.25])).splitlines()[2] == "| 64 | 4 | 5.125 | 0.500 | 5.000, 5.250 | 1.0 |"


def test_every_population_reads_the_same_text():
    config = Config(streams=8, bytes_per_update=50)
    for population in (64, 1024):
        given = dict(zip(*[iter(config.arguments(population))] * 2, strict=True))
        assert int(given["--population-size"]) // int(given["--group"]) == 8 and given["--bytes-per-update"] == "50"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--populations", "48"], "populations must be different multiples of twice the streams"),
        (["--populations", "64", "64"], "populations must be different multiples of twice the streams"),
        (["--seeds", "0"], "seeds must be an integer >= 1, got 0."),
        (["--alpha", "2"], "alpha must be in (0, 1], got 2.0."),
    ],
)
def test_bad_options_end_with_a_clear_error(options, sentence, tmp_path):
    with pytest.raises(SystemExit, match="error: ") as stopped:
        suite.main(["--folder", str(tmp_path / "study"), *options])
    assert sentence in str(stopped.value)


BASELINES = {
    "options": {"streams": 2, "bytes_per_update": 5, "updates": 2, "layers": 1, "width": 8, "validation_bytes": 2_000_000},
    "corpus": "text",
    "baselines": {"egg-adam": {"validation_bits": 4.0}},
}


@pytest.mark.parametrize(
    ("changes", "options", "sentence"),
    [
        ({}, {}, None),
        ({"corpus": "another"}, {}, "baselines must have read the text of the runs in .*, got another in "),
        ({}, {"width": 16}, "baselines must have width 8 as the study has, got 16 in "),
        ({}, {"layers": 2}, "baselines must have layers 1 as the study has, got 2 in "),
        ({}, {"validation_bytes": 9}, "baselines must have validation_bytes 2000000 as the study has, got 9 in "),
        ({"baselines": None}, {}, "baselines must be a results.json of experiments.egg_baselines, got "),
        ({"options": {}}, {}, "baselines must be a results.json of experiments.egg_baselines, got "),
    ],
)
def test_baselines_are_of_the_same_text_and_model(changes, options, sentence, tmp_path):
    write_json(tmp_path / "results.json", BASELINES | {"options": BASELINES["options"] | options} | changes)
    config = Config((4,), 2, 5, 2, 1, 8, 1, tmp_path / "results.json", tmp_path / "study")
    setting = suite.make_setting(config.folder, 4, config.arguments(4))
    (setting.folder / "seed-0").mkdir(parents=True)
    finished = {"generations": 2, "corpus": "text", "bytes_read": 40, "seconds": 1.0, "validation_bits": 5.0}
    write_json(setting.folder / "seed-0" / "summary.json", {"options": setting.options} | finished)
    with nullcontext() if sentence is None else pytest.raises(ValueError, match=sentence):
        assert suite.make_suite(config, []).jobs


@pytest.mark.slow
def test_a_study_runs_what_is_missing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(40):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{number}.txt").write_text(f"{number}: import sys\nprint(sys.argv)\n" * 40)
    options = ["--populations", "4", "8", "--streams", "2", "--seeds", "1", "--generations", "2", "--width", "8"]
    options += ["--bytes-per-update", "5", "--folder", "out/study", "--data", "texts"]
    suite.main(options)
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert first["failed"] == {} and [row["population"] for row in first["rows"]] == [4, 8]
    assert {row["bytes_read"] for row in first["rows"]} == {4 * 5 * 2, 8 * 5 * 2}
    for name in ("table.md", "scaling.png", "results.json"):
        assert (tmp_path / "out/study" / name).exists(), name
    monkeypatch.setattr(sys, "executable", "false")  # nothing can be run any more
    suite.main(options)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == first["rows"]
