"""docs/choosing.md, the command that measures its table, and runs that name their bad setting."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from eggroll.experiments.common.options import flag, option_values
from eggroll.experiments.common.suite import Result
from eggroll.experiments.egg.config import Config as EggConfig
from eggroll.experiments.reason.config import Config as ReasonConfig
from eggroll.experiments.rl import __main__ as rl
from eggroll.experiments.rl import choosing, evolution
from eggroll.experiments.rl.config import Config
from eggroll.experiments.rl.report import find_members_at_random
from eggroll.experiments.zo.config import Config as ZOConfig
from eggroll.runs.metrics import seal

pytestmark = pytest.mark.usefixtures("standard_promotion")  # optax.adam relies on the former
PAGE = Path(__file__).parents[3] / "docs" / "choosing.md"


def test_the_page_has_the_rows_that_the_command_writes():
    head, _, *rows = choosing.split_page(PAGE)[1].splitlines()
    assert [head] == choosing.make_table([]).splitlines()[:1]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [(name, option.strip("`")) for name, option, *_ in cells] == choosing.labels(choosing.KNOBS)
    returns = r"-?\d+ \[-?\d+, -?\d+\] -?\d+ \d+"
    assert all(len(row) == len(choosing.HEAD) and re.fullmatch(returns, " ".join(row[2:5])) for row in cells)


def test_the_options_and_numbers_that_the_page_names_exist():
    text = PAGE.read_text()
    configs = Config(), choosing.Config(), ReasonConfig(), ZOConfig(), EggConfig()
    known = {flag(option) for config in configs for option in option_values(config)} | {"--no-normalise"}
    assert {*re.findall(r"(?<![-!<])--[a-z][\w.-]+", text)} <= known
    fields = {*re.findall(r"\| `(\w+)`", text[text.index("| symptom |") :])}
    assert fields - {"best_return"} <= {*evolution.Record.__annotations__, "held_out_minus_mean"} and len(fields) > 5


def test_a_row_has_the_medians_of_the_last_generations(tmp_path):
    setting = choosing.make_setting(tmp_path, "sigma", "--sigma 5", ["--sigma", "1", "--env-steps", "99"])
    assert setting.options["sigma"] == 5 and setting.options["env_steps"] == 99
    found = {}
    for seed, mean_return in enumerate((-3.0, -1.0, -8.0)):
        lines = [dict.fromkeys(choosing.NUMBERS, float(index + seed)) for index in range(30)]
        folder = setting.folder / f"seed-{seed}"
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(seal(json.dumps(line)) for line in lines))
        unusual = ["weight_norm"] if seed else []
        found[seed] = {"mean_return": mean_return, "best_return": 2 * seed, "generations": 30, "unusual": unusual}
    (row,) = choosing.make_table([choosing.make_row(Result(setting, found))]).splitlines()[2:]
    numbers = " | ".join(["20.5"] * len(choosing.NUMBERS))  # generations 10 to 29 of each
    assert row == f"| sigma | `--sigma 5` | -3 [-8, -1] | 2 | 30 | {numbers} | `weight_norm` |"
    for seed in found:
        found[seed] |= {"mean_return": None, "best_return": None}  # not finite
    lines = [dict.fromkeys(choosing.NUMBERS) for _ in range(30)]
    for seed in found:
        (setting.folder / f"seed-{seed}/metrics.jsonl").write_text("".join(seal(json.dumps(line)) for line in lines))
    (row,) = choosing.make_table([choosing.make_row(Result(setting, found))]).splitlines()[2:]
    assert row.startswith("| sigma | `--sigma 5` | - | nan | 30 | nan | nan | ")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--knobs", "colour"], "knobs must be out of population, sigma, .*, got colour."),
        (["--seeds", "0"], "seeds must be an integer >= 1, got 0."),
        (["--env", "CartPole-v1"], "--env cannot be given to a suite, which sets it for every run."),
        (["--page", "README.md"], "README.md has no <!-- measured: begin --> and <!-- measured: end -->, between which"),
    ],
)
def test_wrong_options_are_clear_errors(options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("nothing\n")
    with pytest.raises(SystemExit, match=f"^error: {words}"):
        choosing.main(options)


def test_a_run_names_what_is_unusual_once(capsys):
    """What the training loop warns of by itself is left to it."""
    found = {"update_over_sigma": "far.", "weight_norm": "Sigma drowns the weights. Lower sigma."}
    task = SimpleNamespace(environment=SimpleNamespace(observation_shape=(2,)))
    progress = evolution._Progress(task, None, look=lambda records: found, most_steps=1)
    for generation in (3, 7):
        progress._name_unusual(generation)
    assert capsys.readouterr().out == "generation 3: Sigma drowns the weights. Lower sigma.\n"


@pytest.mark.parametrize(
    ("mean", "held_out", "is_named"), [(-9.0, -4.0, True), (-7.0, -4.0, False), (-9.0, -7.5, False), (-9.0, None, False)]
)
def test_members_below_random_actions_are_named(mean, held_out, is_named):
    """They are so because of sigma where the unperturbed parameters exceed them by more than their spread."""
    extra = {} if held_out is None else {"held_out_return": held_out}
    record = SimpleNamespace(mean_fitness=mean, std_fitness=2.0, sigma=0.5, extra={})
    skipped = SimpleNamespace(**vars(record) | {"mean_fitness": float("nan"), "std_fitness": float("nan")})
    history = [record, *[SimpleNamespace(**vars(record) | {"extra": extra})] * 3, record, *[skipped] * 9]
    found = find_members_at_random(history, -8.0)
    assert list(found) == ["held_out_minus_mean"] * is_named and find_members_at_random(history, None) == {}
    assert find_members_at_random([*history, SimpleNamespace(**vars(record) | {"mean_fitness": -2.0})], -8.0) == {}  # it learns
    assert not is_named or "-9 is below that of random actions, -8, and 5 below" in found["held_out_minus_mean"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "number", "remedy"),
    [
        (["--sigma", "1e-5"], "pair_correlation", r"Raise sigma \(now 1e-05\)"),
        (["--sigma", "5"], "weight_norm", r"Sigma \(5\) is \d+.* Lower sigma"),
        (["--learning-rate", "20"], "update_over_sigma|weight_norm", r"(sigma \(update|grew from \d+).*ower the learning rate"),
    ],
    ids=["sigma too small", "sigma too large", "steps too large"],
)
@pytest.mark.filterwarnings("ignore:updates moved:UserWarning", "ignore:both members:UserWarning")
def test_a_bad_setting_on_pendulum_is_named_by_the_run(options, number, remedy, tmp_path, capsys):
    """The printed line, which the log has too, says which number shows it and what to try."""
    small = ["--env", "Pendulum-v1", "--hidden-sizes", "16", "--population-size", "16", "--env-steps", "120000"]
    small += ["--evaluation-episodes", "20", "--checks", "2", "--on-device", "1", "--folder", str(tmp_path)]
    rl.main([*small, *options])
    printed = capsys.readouterr().out.splitlines()
    assert any(re.fullmatch(number, name) for name in json.loads(printed[-1])["unusual"])
    (last,) = [line for line in printed if line.startswith("seed 0") and re.search(rf"\b({number})\b", line)]
    assert re.search(remedy, last) and last in (tmp_path / "log.txt").read_text()


@pytest.mark.slow
def test_the_command_writes_the_table_into_the_page(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{''.join(choosing.MARKS)}\nafter\n")
    options = ["--knobs", "noise reuse", "--seeds", "1", "--env-steps", "2000", "--max-steps", "10"]
    choosing.main([*options, "--evaluation-episodes", "4", "--folder", "suite", "--page", "page.md"])
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["options"] for row in summary["rows"]] == ["", "--noise-reuse 4"] and summary["failed"] == {}
    before, table, after = choosing.split_page(page)
    assert before == "before\n" and after == "\nafter\n" and table == (tmp_path / "runs/suite/table.md").read_text()
