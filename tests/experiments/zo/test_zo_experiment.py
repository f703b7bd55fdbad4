"""Fine-tuning experiments from the command line to the artefacts, on a model and a task that take seconds."""

import contextlib
import dataclasses
import io
import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from eggroll import zo as library
from eggroll.experiments.common.options import drop_options
from eggroll.experiments.common.run import write_json
from eggroll.experiments.zo import __main__ as zo
from eggroll.experiments.zo import evaluation, evolution, inputs
from eggroll.experiments.zo.config import BACKPROP, RECIPES, SMALL, Config, config_from, parse
from eggroll.experiments.zo.data import sentiment
from eggroll.experiments.zo.data.examples import batch_of
from eggroll.experiments.zo.inputs import check_task, keep_task
from eggroll.experiments.zo.problem import score
from eggroll.journal import Reader, replay
from eggroll.journal import __main__ as journal
from eggroll.journal.lock import RunLock
from eggroll.llm import hf
from eggroll.noise.rules import Dense, Flipout, LowRank

pytestmark = pytest.mark.usefixtures("standard_promotion")  # optax.adam relies on it
MEASURED = {"seconds": 0, "forwards_per_second": 0, "peak_mib": 0}
START = ["--start.steps", "0", "--start.width", "16", "--start.layers", "1"]
WHOLE = ["--recipe", "mezo", "--steps", "6", "--checks", "3", "--batch-size", "4", "--options", "second_moment=0.9"]
WHOLE += ["--sigma", "0.001", "--no-guidance"]


def write(folder, **sizes):
    """Splits of a task of few bytes."""
    folder.mkdir(exist_ok=True)
    numbers = itertools.count()
    for name, size in sizes.items():
        lines = [json.dumps({"text": f"{'ab'[n % 2]}{n}", "label": n % 2}) for n in itertools.islice(numbers, size)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder to run in, with data, and the options that all runs have."""
    place = tmp_path_factory.mktemp("zo")
    data = write(place / "data", train=12, validation=6, test=6)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)  # the small model is cached in runs/
        yield place, [*START, "--data", str(data), "--template", "{text}:", "--label-words", "0", "-", "1", "++"]


@pytest.fixture(scope="module")
def whole(place):
    """Experiment, summary and folder of one small run."""
    folder, made, out = place[0] / "whole", [], io.StringIO()

    class Kept(zo.Experiment):
        def __init__(self, config):
            super().__init__(config)
            made.append(self)

    options = [*place[1], *WHOLE]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(zo, "Experiment", Kept)
        zo.main([*options, "--folder", str(folder)])
    return made[0], json.loads(out.getvalue().splitlines()[-1]), folder


def run(capsys, *arguments):
    """Summary of the experiment with these options."""
    zo.main(arguments)
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def weights(folder):
    return (folder / "model" / "model.safetensors").read_bytes()


def test_summary_and_artefacts(whole):
    _, summary, folder = whole
    scores = [f"{split}_{what}" for split in ("train", "validation", "test") for what in ("loss", "accuracy")]
    names = ["recipe", "objective", "steps", "forwards", "ended", "seconds", "forwards_per_second", "skipped", *scores]
    assert list(summary) == [*names, *(f"{name}_before" for name in scores[2:]), "peak_mib"]
    assert (summary["recipe"], summary["steps"], summary["forwards"], summary["skipped"]) == ("mezo", 6, 12, 0)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert ["validation_accuracy" in line for line in lines] == [False, True] * 3
    assert lines[-1]["validation_loss"] == pytest.approx(summary["validation_loss"])
    assert summary["validation_loss"] != summary["validation_loss_before"]
    assert [line["steps"] for line in lines] == [1, 2, 3, 4, 5, 6] and summary["ended"] == "steps"
    for line in lines:
        assert line["loss"] == -line["mean_fitness"]
        assert line["projected_gradient"] > 0
    log = (folder / "log.txt").read_text()
    for words in ("12 training, 6 validation, 6 test examples", "zero-shot: validation loss", "step 2: training loss"):
        assert words in log, words
    assert "ended after 6 steps (12 forwards)" in log and "--steps 6 are done" in log
    for name in ("curves.png", "fitness.png", "journal.bin", "summary.json"):
        assert (folder / name).exists(), name


@pytest.mark.slow
def test_a_run_that_stopped_goes_on_bit_for_bit(whole, monkeypatch):
    experiment, summary, folder = whole
    stopped, other = evolution.train, folder.parent / "stopped"
    monkeypatch.setattr(experiment, "config", dataclasses.replace(experiment.config, folder=other))
    with monkeypatch.context() as patch:
        patch.setattr(evolution, "train", lambda *args, generations, **more: stopped(*args, generations=3, **more))
        assert experiment.run()["steps"] == 3
    assert weights(other) != weights(folder)
    monkeypatch.setattr(experiment, "config", dataclasses.replace(experiment.config, resume=True))
    row = experiment.run()
    assert row | MEASURED == {name: summary[name] for name in row} | MEASURED and weights(other) == weights(folder)
    first, second = ((path / "metrics.jsonl").read_text().splitlines() for path in (folder, other))
    assert [json.loads(line)["mean_fitness"] for line in first] == [json.loads(line)["mean_fitness"] for line in second]
    spent = [json.loads(line)["seconds_spent"] for line in second]
    assert spent == sorted(spent) and row["seconds"] > spent[-1] - 0.01  # those before the resume are counted
    monkeypatch.setattr(experiment.runs, "_config", dataclasses.replace(experiment.config, sigma=0.5))
    with pytest.raises(ValueError, match=r"other settings: sigma \(was 0.001, is 0.5\)"):
        experiment.run()


def test_the_journal_and_the_exported_model_have_the_tuned_parameters(whole):
    experiment, summary, folder = whole
    config, _, params = hf.load(folder / "model")
    assert config == experiment.loaded.config
    found = score(lambda batch: experiment.judge(params, batch), experiment.task.test)
    assert found == (pytest.approx(summary["test_loss"]), pytest.approx(summary["test_accuracy"]))
    tuner, initial = experiment.runs.start(experiment.loaded.params, key=jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, replay(tuner, initial, Reader(folder / "journal.bin")).params, params)


def test_the_journal_knows_its_run(whole):
    options = Reader(whole[2] / "journal.bin").header.recipe["options"]
    config = config_from(json.loads(json.dumps(options)))
    assert {Path(name).stem: len(digest) for name, digest in options["contents"].items()} == dict.fromkeys(inputs.SPLITS, 64)
    assert config_from({name: value for name, value in options.items() if name != "contents"}) == config  # before 0.3
    assert config == dataclasses.replace(whole[0].config, folder=None, guidance=True, perturbation="rademacher")


@pytest.mark.slow
def test_a_finished_run_is_extended(whole, place, capsys):
    """It becomes the longer run, and its last and its best parameters can be scored."""
    options, longer, extended = [*place[1], *WHOLE], place[0] / "longer", place[0] / "extended"
    shutil.copytree(whole[2], extended)
    more = [*options, "--steps", "9", "--checks", "9", "--checkpoint-every", "2"]
    first = run(capsys, *more, "--folder", str(longer))
    again = run(capsys, *more, "--folder", str(extended), "--resume")
    assert again | MEASURED == first | MEASURED and weights(extended) == weights(longer)
    unchanged = run(capsys, *more, "--folder", str(extended), "--resume", "--steps", "3")
    assert unchanged["steps"] == 9 and weights(extended) == weights(longer)
    with pytest.raises(SystemExit, match="has a run with other settings: batch_size"):
        zo.main([*more, "--folder", str(extended), "--resume", "--batch-size", "3"])
    capsys.readouterr()


@pytest.mark.slow
def test_scores_of_a_finished_run_and_of_a_model(whole, place, capsys, monkeypatch):
    _, summary, folder = whole
    names = [f"{split}_{what}" for split in ("validation", "test") for what in ("loss", "accuracy")]
    before = sorted(folder.iterdir())
    found = run(capsys, *place[1], *WHOLE, "--evaluate", "--folder", str(folder))  # the command of the run, or none of it
    assert [found[name] for name in names] == pytest.approx([summary[name] for name in names])
    assert found["steps"] == 6 and found["validation_loss_best"] <= found["validation_loss"]
    for step in (0, 4):  # as if it had been the best
        monkeypatch.setattr(evaluation, "best_step", lambda *_, step=step, **more: step)
        best = run(capsys, "--evaluate", "--folder", str(folder))
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        loss = rows[step - 1]["validation_loss"] if step else summary["validation_loss_before"]
        assert best["best_step"] == step and best["validation_loss_best"] == pytest.approx(loss)
    assert sorted(folder.iterdir()) == before
    options = [*place[1][len(START) :], "--model", str(folder / "model"), "--evaluate"]
    model = run(capsys, *options)
    assert [model[name] for name in names] == pytest.approx([summary[name] for name in names])
    by_block = run(capsys, *options, *(() if "--offload" in options else ("--offload",)))
    assert [by_block[name] for name in names] == pytest.approx([summary[name] for name in names])


def test_a_folder_that_cannot_be_scored_is_a_clear_error(tmp_path):
    def folder(name, **fields):
        write_json(tmp_path / name / "summary.json", {"options": Config().settings(), "seed": 3, **fields})
        return tmp_path / name

    for name in ("removed", "other", "whole/model", "several/seed-0", "several/seed-1", "none"):
        (tmp_path / name).mkdir(parents=True)
    count = f"with --evaluate of {folder('whole')}, whose own options count."
    for given, words in (
        ([tmp_path / "none"], "none has no finished run: there is no summary.json in it."),
        ([tmp_path / "absent"], "there is no folder"),
        ([tmp_path / "several"], "several has the runs of several seeds; name one of seed-0, seed-1 in it."),
        ([folder("other", options={"env": "CartPole-v1"})], "other is a run of another experiment than experiments.zo."),
        ([folder("removed")], "removed has no model: it was removed, as a comparison of recipes does."),
        ([folder("whole"), "--task", "rte", "--recipe", "mezo"], f"--task has no effect {count}"),
        ([folder("whole"), "--start.layers", "9"], f"--start.layers has no effect {count}"),
        ([folder("whole"), "--seed", "4"], f"--seed has no effect {count}"),
    ):
        with pytest.raises(SystemExit) as ended:
            zo.main(["--evaluate", "--folder", *map(str, given)])
        assert words in str(ended.value) and "\n" not in str(ended.value)


@pytest.mark.slow
def test_backprop_of_an_exported_model_on_several_seeds(whole, place, capsys):
    options = [*place[1][len(START) :], "--model", str(whole[2] / "model"), "--recipe", "adam", "--learning-rate", "0.01"]
    folder = place[0] / "adam"
    summary = run(
        capsys, *options, "--steps", "30", "--seeds", "2", "--batch-size", "12", "--checks", "1", "--folder", str(folder)
    )
    first, second = summary["seeds"]
    assert (first["seed"], second["seed"], summary["forwards"]) == (0, 1, 30)
    assert summary["train_loss"] == pytest.approx((first["train_loss"] + second["train_loss"]) / 2)
    # Batches of everything: the seeds differ by the order of a sum, and the classes can be told apart by one letter.
    assert first["train_loss"] == pytest.approx(second["train_loss"], rel=1e-2)
    assert summary["train_accuracy"] == 1 and first["validation_loss_before"] == pytest.approx(whole[1]["validation_loss"])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [name for name in library.RECIPES if name != "lozo_m"])  # whose momentum cannot be deferred
def test_every_recipe_tunes_a_model_away_from_the_device(recipe, place, capsys, monkeypatch):
    """Offloaded and resident runs agree; an interrupted offloaded run resumes bit for bit, and its journal rebuilds it."""
    options = [
        *place[1],
        "--recipe",
        recipe,
        "--directions",
        "4" if recipe == "grzo" else "2",  # of an example each
        "--steps",
        "4",
        "--batch-size",
        "4",
        "--checkpoint-every",
        "2",
        "--no-guidance",
    ]
    whole, stopped = (["--offload", "--folder", str(place[0] / f"{name}-{recipe}")] for name in ("away", "back"))
    resident = run(capsys, *options, "--folder", str(place[0] / f"here-{recipe}"))
    away = run(capsys, *options, *whole)
    assert away["validation_loss"] == pytest.approx(resident["validation_loss"], rel=1e-3)
    assert away["forwards"] == resident["forwards"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(evolution.Checks, "due", lambda self, done: done == 3 and (_ for _ in ()).throw(KeyboardInterrupt))
        zo.main([*options, *stopped])
    capsys.readouterr()
    assert run(capsys, *options, *stopped, "--resume") | MEASURED == away | MEASURED
    assert weights(place[0] / f"back-{recipe}") == weights(place[0] / f"away-{recipe}")
    lines = [(place[0] / f"{name}-{recipe}" / "metrics.jsonl").read_text().splitlines() for name in ("here", "away")]
    here, offloaded = ([list(json.loads(line)) for line in of_run] for of_run in lines)
    assert here == offloaded and len(here) == 4
    journal.main(["verify", str(place[0] / f"back-{recipe}")])
    assert "2 checkpoints are rebuilt bit for bit" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="has a run with other settings: sigma"):
        zo.main([*options, *stopped, "--resume", "--sigma", "0.5"])


def test_an_offloaded_run_of_the_last_version_is_refused(place):
    folder = place[0] / "old"
    (folder / "checkpoints" / "4").mkdir(parents=True)
    (folder / "checkpoints" / "settings.json").write_text("{}")
    options = [*place[1], "--offload", "--steps", "4", "--batch-size", "4", "--folder", str(folder), "--resume"]
    with pytest.raises(SystemExit, match=r"error: .*old has an offloaded run of version 0.1, which kept no journal"):
        zo.main(options)
    assert not (folder / "journal.bin").exists()


@pytest.mark.slow
def test_checkpoints_bring_a_run_back_bit_for_bit(whole, place, capsys, monkeypatch):
    """As above with another process's memory: nothing but the folder is left."""
    stopped, options = evolution.train, [*place[1], *WHOLE, "--checkpoint-every", "2", "--folder", str(place[0] / "dates")]
    with monkeypatch.context() as patch:
        patch.setattr(evolution, "train", lambda *args, generations, **more: stopped(*args, generations=3, **more))
        zo.main(options)
    capsys.readouterr()
    assert run(capsys, *options, "--resume") | MEASURED == whole[1] | MEASURED
    assert weights(place[0] / "dates") == weights(whole[2])
    journal.main(["verify", str(place[0] / "dates")])
    assert "3 checkpoints are rebuilt bit for bit" in capsys.readouterr().out


@pytest.mark.slow
def test_accuracy_is_an_objective(place, capsys):
    options = [*place[1], "--recipe", "mezo", "--objective", "accuracy", "--steps", "2", "--batch-size", "12", "--no-guidance"]
    summary = run(capsys, *options, "--mesh", "population=1", "--folder", str(place[0] / "accuracy"))
    lines = [json.loads(line) for line in (place[0] / "accuracy" / "metrics.jsonl").read_text().splitlines()]
    assert summary["objective"] == "accuracy"
    assert all(float(-line["mean_fitness"] * 24).is_integer() for line in lines)  # wrong ones of 2 forwards of 12


def test_batches_differ_by_seed(whole):
    train = whole[0].task.train
    orders = [batch_of(train, 0, size=12, seed=seed).tokens.tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize(
    ("recipe", "noise"),
    [
        ("mezo", Dense("rademacher")),
        ("lozo", LowRank(2, "rademacher", refresh=50)),
        ("lozo_m", LowRank(4, "rademacher", refresh=50)),
        ("grzo", Flipout("rademacher")),
    ],
)
def test_every_recipe_takes_rademacher_noise(recipe, noise):
    options = ["--options", "rank=4"] if recipe == "lozo_m" else []
    config = parse([*START, "--recipe", recipe, "--perturbation", "rademacher", *options])
    config.check()
    assert (
        evolution.make_tuner(config, SimpleNamespace(pieces=lambda objective: lambda params, batch, key: 0.0)).perturbation
        == noise
    )


def test_a_run_of_mezo_from_before_keeps_its_normal_noise():
    settings = parse([*START, "--recipe", "mezo"]).settings()
    assert settings["perturbation"] == "rademacher"
    before = settings | {"perturbation": None}
    with pytest.raises(ValueError, match=r"not those of experiments\.zo in this version: 'start'"):
        config_from({name: value for name, value in before.items() if name != "start"})
    assert config_from(before).perturbation == "normal" and config_from(settings).perturbation == "rademacher"
    assert parse([*START, "--recipe", "mezo", "--perturbation", "normal"]).identity(before)["perturbation"] is None
    assert parse([*START, "--recipe", "mezo"]).identity(before)["perturbation"] == "rademacher"  # another run, which is refused


def test_every_recipe_has_settings_that_check():
    for recipe in RECIPES:
        parse(["--recipe", recipe, *([] if recipe in SMALL else ["--learning-rate", "1"])]).check()
    assert set(SMALL) <= set(RECIPES) == {*library.RECIPES, BACKPROP}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", "meso"], "recipe must be one of mezo, adamezo, lozo, lozo_m, fzoo, spsa15, grzo, adam"),
        (["--task", "sst3"], "task must be one of sentiment, sst2, rte, got 'sst3'."),
        (["--objective", "f1"], "objective must be one of loss, accuracy, got 'f1'."),
        (["--steps", "0"], "steps must be an integer >= 1, got 0."),
        (["--seed", "-1"], "seed must be an integer from 0 to 4294967295, got -1."),
        (["--batch-size", "0"], "batch_size must be an integer >= 1, got 0."),
        (["--sigma", "0"], "sigma must be a finite number > 0, got 0.0."),
        (["--learning-rate", "inf"], "learning_rate must be a finite number > 0, got inf."),
        (["--options", "rank"], "options must be such as rank=4, got 'rank'."),
        (["--options", "rank=4"], "options: recipe mezo has no 'rank', it has"),
        (["--recipe", "lozo", "--options", "sigma=4"], "options: recipe lozo has no 'sigma', it has"),
        (["--recipe", "lozo", "--options", "rank=many"], "rank must be an integer >= 1, got 'many'."),
        (["--recipe", "lozo", "--options", "rank=0"], "rank must be an integer >= 1, got 0."),
        (["--model", "nowhere"], "learning_rate must be given: none is known for mezo on this model; --probe measures one."),
        (["--model", "nowhere", "--learning-rate", "1"], "model must be a folder with a checkpoint, got nowhere."),
        (
            ["--recipe", "lozo", "--perturbation", "lowrank"],
            "--perturbation has no effect as lowrank with a recipe whose noise has a form of its own",
        ),
        (["--precision", "stochastic"], "--precision has no effect without --dtype bfloat16"),
        (
            ["--model", "x", "--dtype", "bfloat16", "--offload", "--precision", "master"],
            "--precision has no effect with --offload,",
        ),
        (["--transfer-dtype", "bfloat16"], "--transfer-dtype has no effect without --offload: it is of blocks in the"),
        (["--evaluate", "--probe"], "give evaluate or probe, not both."),
        (["--recipe", "adam", "--sigma", "1"], "--sigma has no effect with --recipe adam: it belongs to mezo"),
        (["--recipe", "adam", "--resume"], "--resume has no effect with --recipe adam: it belongs to mezo"),
        (["--recipe", "adam", "--objective", "accuracy"], "objective accuracy has no gradient: adam needs"),
        (["--label-words", "0", "a", "1", "b"], "label_words need a template, such as '{text} It was'."),
        (["--label-words", "0", "a", "1", "b", "--answer", "{a}"], "label_words make a classification and answer a generation"),
        (["--template", "{text"], "template '{text' is not well formed"),
        (["--template", "{text.size}"], "template '{text.size}' must name fields of a line and nothing within them."),
        (["--template", "{text!q}"], "template '{text!q}' is not well formed: Unknown conversion specifier"),
        (["--data", "nowhere"], "data must be a JSONL file or a folder with train, validation and test, got nowhere."),
        (["--data", "."], "data . has no train.jsonl, validation.jsonl, test.jsonl."),
        (["--data", "data/test.jsonl"], "data data/test.jsonl has 6 records, 10 are needed to split one file."),
        (["--template", "{title}"], "data/train.jsonl, line 1: field 'title' is missing; the line has text, label."),
        (["--batch-size", "13"], "batch_size must be at most the 12 training examples, got 13."),
        (["--mesh", "pairs=2"], "mesh must be such as population=4,data=2, with axes out of population, data, got"),
        (["--mesh", "population=64"], "mesh 'population=64' has 64 devices, this run has"),
        (["--mesh", "model=1"], "mesh must be such as population=4,data=2, with axes out of population, data, got 'model=1'."),
        (["--recipe", "lozo_m", "--offload"], "momentum cannot be deferred block by block"),
        (
            ["--mesh", "data=2", "--batch-size", "3"],
            "batch_size must be a multiple of the 2 devices of mesh axis 'data', got 3.",
        ),
        (["--recipe", "grzo", "--directions", "3"], "estimator grzo gives every direction an example: batch leaves need"),
        (["--recipe", "fzoo", "--forwards", "8"], "forwards 8 are fewer than the 9 of one step of fzoo."),
        (["--recipe", "fzoo", "--directions", "1"], "estimator fzoo divides by the spread of the losses"),
        (["--recipe", "lozo_m", "--options", "refresh=1"], "momentum lives in the right factors that steps share: "),
        (["--start.width", "20"], "start.width must be a multiple of 16, got 20."),
    ],
)
def test_bad_options_end_with_a_clear_error(arguments, words, place, capsys):
    options = [*place[1][: len(START)], "--data", "data", "--batch-size", "4", "--folder", str(place[0] / "bad")]
    options = drop_options(options, parse([*options, *arguments]).ignored())
    run = place[0] / "bad" / "journal.bin"
    run.parent.mkdir(exist_ok=True)
    run.write_bytes(b"generations")
    with pytest.raises(SystemExit) as ended:
        zo.main([*options, *arguments])
    assert str(ended.value).startswith(f"error: {words}") and "\n" not in str(ended.value)
    assert "{" not in capsys.readouterr().out
    assert run.read_bytes() == b"generations"  # a command that cannot run removes no run


def test_a_second_command_leaves_the_data_of_a_run_in_progress(place, tmp_path):
    lock = RunLock(tmp_path)
    with pytest.raises(SystemExit, match=r"^error: .* in use"):
        zo.main([*START, "--batch-size", "2", "--forwards", "2", "--max-length", "40", "--folder", str(tmp_path)])
    lock.release()
    assert not (tmp_path / "data").exists()


def test_a_run_keeps_the_task_that_ships(tmp_path):
    for data, files in ((tmp_path, []), (None, ["test.jsonl", "train.jsonl", "validation.jsonl"])):
        keep_task(Config(data=data), tmp_path / "run")
        assert sorted(path.name for path in tmp_path.glob("run/data/*")) == files


@pytest.mark.parametrize(
    ("recorded", "options", "refused"),
    [
        (None, {}, True),
        ("data", {"resume": True}, True),
        ("data", {"data": Path("data")}, False),
        ("shipped", {}, False),  # the new run replaces it, with its data
        ("shipped", {"resume": True}, True),
        ("shipped", {"resume": True, "accept_change": True}, False),
    ],
)
def test_a_run_does_not_replace_data_that_no_run_wrote(recorded, options, refused, tmp_path):
    if recorded is not None:
        settings = Config(data=None if recorded == "shipped" else Path(recorded)).settings()
        write_json(tmp_path / "summary.json", {"options": settings, "seed": 0})
    write(tmp_path / "data", test=3)
    words = r"data/test.jsonl is not of the task that ships, .* would write there; give --data, or choose another folder"
    with pytest.raises(ValueError, match=words) if refused else contextlib.nullcontext():
        check_task(Config(**options), tmp_path)


def test_the_data_of_an_earlier_run_may_be_of_either_model(tmp_path):
    sentiment.write(tmp_path / "data", short=True)  # the small one
    check_task(Config(model=Path("x")), tmp_path)


def test_data_that_changed_are_refused(whole, tmp_path, monkeypatch):
    """At a resume and where a run is scored; a run begun before has no digests."""
    experiment, _, folder = whole
    data = shutil.copytree(experiment.config.data, tmp_path / "data")
    digests = inputs.read_contents(data)
    (data / "test.jsonl").write_text((data / "train.jsonl").read_text())
    words = "test.jsonl has changed since the run began: .*; restore it, or"
    config = dataclasses.replace(experiment.config, data=data, folder=tmp_path, resume=True)
    monkeypatch.setattr(experiment, "contents", inputs.read_contents(data))
    for recorded, change, refused in ((digests, False, True), (digests, True, False), (None, False, False)):
        monkeypatch.setattr(zo, "recorded_contents", lambda _, recorded=recorded: recorded)
        monkeypatch.setattr(experiment, "config", dataclasses.replace(config, accept_change=change))
        with pytest.raises(ValueError, match=f"{words} continue with --accept") if refused else contextlib.nullcontext():
            experiment._check_folder(tmp_path)
    (tmp_path / "model").mkdir()
    for given, recorded, refused in (
        (None, digests, True),
        (data, digests, True),
        (folder, digests, False),
        (data, None, False),
    ):
        settings = config.settings() | ({} if recorded is None else {"contents": recorded})
        write_json(tmp_path / "summary.json", {"options": settings, "seed": 0})
        with pytest.raises(ValueError, match=f"{words} score other data by") if refused else contextlib.nullcontext():
            evaluation._of_run(Config(data=given), tmp_path)


def test_every_folder_is_checked_before_its_run_is_touched(whole, place, monkeypatch):
    """And the shipped task is written once the settings of a resume are accepted."""
    experiment, written, folder = whole[0], [], place[0] / "checked"
    config = dataclasses.replace(experiment.config, data=None, folder=folder)
    for owner, name in ((experiment, "config"), (experiment.runs, "_config")):
        monkeypatch.setattr(owner, name, config)
    monkeypatch.setattr(inputs.sentiment, "write", lambda *_, **__: written.append(1))
    monkeypatch.setattr(evolution, "DurableRun", lambda *_, **__: (_ for _ in ()).throw(ValueError("other settings")))
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").touch()
    with pytest.raises(ValueError, match="checked has no run, but model, which a run would replace"):
        experiment.run()
    assert [path.name for path in folder.iterdir()] == ["model"]
    shutil.rmtree(folder / "model")
    with pytest.raises(ValueError, match="other settings"):
        experiment.run()
    assert written == []
    monkeypatch.setattr(zo, "check_task", lambda config, folder: (_ for _ in ()).throw(ValueError(f"data of {folder.name}")))
    with pytest.raises(ValueError, match="data of checked"):
        experiment.run()


def test_a_run_does_not_replace_the_model_that_it_starts_from(whole, place):
    _, _, folder = whole
    before, start = weights(folder), place[0] / "start"
    start.symlink_to(folder / "model")
    options = [*place[1][len(START) :], *WHOLE, "--learning-rate", "1", "--folder", str(folder)]
    for model in (folder / "model", start):
        with pytest.raises(SystemExit, match=r"^error: model \S+ is that of the run in \S+, which would replace it; choose"):
            zo.main([*options, "--model", str(model)])
    assert weights(folder) == before and (folder / "journal.bin").exists()
