"""Fine-tuning experiments from the command line to the artefacts, on a model and a task that take seconds."""

import contextlib
import dataclasses
import io
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eggroll import zo as library
from eggroll.envs.tasks.records import read_records
from eggroll.experiments.common.options import drop_options
from eggroll.experiments.zo import __main__ as zo
from eggroll.experiments.zo import evolution
from eggroll.experiments.zo.config import BACKPROP, RECIPES, SMALL, config_from, parse
from eggroll.experiments.zo.data.examples import Examples, batch_of, encode
from eggroll.experiments.zo.data.tasks import Classification, Generation
from eggroll.experiments.zo.inputs import read_splits
from eggroll.experiments.zo.problem import FineTuning, score
from eggroll.experiments.zo.warm_start import Text, WarmStart, init, train
from eggroll.journal import Reader, replay
from eggroll.journal import __main__ as journal
from eggroll.llm import hf
from eggroll.llm.decoder import Decoder, apply, token_log_likelihood
from eggroll.llm.models import transformer
from eggroll.llm.tokenizers import ByteTokenizer
from eggroll.zo.blocks import whole_loss

pytestmark = pytest.mark.usefixtures("standard_promotion")  # optax.adam relies on it
MEASURED = {"seconds": 0, "forwards_per_second": 0, "peak_mib": 0}
START = ["--start.steps", "0", "--start.width", "16", "--start.layers", "1"]
WHOLE = ["--recipe", "mezo", "--steps", "6", "--checks", "3", "--batch-size", "4", "--options", "second_moment=0.9"]
WHOLE += ["--sigma", "0.001"]
SHORT = Classification("{text}:", {"0": "-", "1": "++"})


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
    names = ["recipe", "objective", "steps", "forwards", "seconds", "forwards_per_second", "skipped", *scores]
    assert list(summary) == [*names, *(f"{name}_before" for name in scores[2:]), "peak_mib"]
    assert (summary["recipe"], summary["steps"], summary["forwards"], summary["skipped"]) == ("mezo", 6, 12, 0)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert ["validation_accuracy" in line for line in lines] == [False, True] * 3
    assert lines[-1]["validation_loss"] == pytest.approx(summary["validation_loss"])
    assert summary["validation_loss"] != summary["validation_loss_before"]
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
    assert config == dataclasses.replace(whole[0].config, folder=None)


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
    ]
    whole, stopped = (["--offload", "--folder", str(place[0] / f"{name}-{recipe}")] for name in ("away", "back"))
    resident = run(capsys, *options, "--folder", str(place[0] / f"here-{recipe}"))
    away = run(capsys, *options, *whole)
    assert away["validation_loss"] == pytest.approx(resident["validation_loss"], rel=1e-3)
    assert away["forwards"] == resident["forwards"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
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
    options = [*place[1], "--recipe", "mezo", "--objective", "accuracy", "--steps", "2", "--batch-size", "12"]
    summary = run(capsys, *options, "--mesh", "population=1", "--folder", str(place[0] / "accuracy"))
    lines = [json.loads(line) for line in (place[0] / "accuracy" / "metrics.jsonl").read_text().splitlines()]
    assert summary["objective"] == "accuracy"
    assert all(float(-line["mean_fitness"] * 24).is_integer() for line in lines)  # wrong ones of 2 forwards of 12


@pytest.mark.parametrize("task", [SHORT, Generation("{text}", "={label}!")], ids=["classification", "generation"])
def test_loss_and_accuracy_are_those_of_whole_logits(task, tmp_path):
    """Logits at some positions give what logits at all of them give; pieces give what the judge gives."""
    records = read_records(write(tmp_path / "data", all=7) / "all.jsonl")
    examples = encode(records, task, ByteTokenizer(), max_length=20)
    config = WarmStart(layers=1, width=16).model
    decoder, params = transformer.make_decoder(config), init(WarmStart(layers=1, width=16))
    params["resident"]["embed"] *= 30  # so that the answers differ
    tuning = FineTuning(decoder, examples, examples, examples)

    @jax.jit
    def ways(params):
        flat = (array.reshape(-1, array.shape[-1]) for array in (examples.tokens, examples.mask))
        logits = apply(decoder, params, *flat).reshape(*examples.tokens.shape, -1)
        scores = token_log_likelihood(logits, examples.tokens, examples.targets).sum(axis=-1)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(scores), examples.labels[:, None], axis=1)
        loss = -chosen.mean() if isinstance(task, Classification) else -scores.sum() / examples.targets.sum()
        plain = loss, jnp.mean(scores.argmax(axis=1) == examples.labels)
        pieces = [whole_loss(tuning.pieces(objective))(params, examples, None) for objective in ("loss", "accuracy")]
        return plain, pieces, tuning.judge()(params, examples)

    plain, ((loss, weight), (wrong, count)), judged = jax.device_get(ways(params))
    assert judged[0] == pytest.approx(plain[0], rel=1e-5) and loss / weight == pytest.approx(plain[0], rel=1e-5)
    assert judged[1] == pytest.approx(1 - wrong / count) and count == 7
    if isinstance(task, Classification):
        assert judged[1] == pytest.approx(plain[1]) and 0 < plain[1] < 1


def test_a_generated_answer_is_right_when_every_token_is_the_likeliest():
    tokens, targets = np.array([[[1, 2, 3]], [[1, 2, 2]]], np.int32), np.array([[[False, True, True]]] * 2)
    examples = Examples(tokens, np.ones((2, 1, 3), bool), targets, np.zeros(2, np.int32))
    decoder = Decoder(
        lambda resident, tokens, mask: (jax.nn.one_hot(tokens, 4), ()),
        lambda own, x, aux: x,
        lambda resident, x: x @ resident["next"],  # the likeliest word after n is n + 1
    )
    params = {"resident": {"next": jnp.roll(jnp.eye(4), 1, axis=1)}, "blocks": {"none": jnp.zeros((1, 1))}}
    judge = FineTuning(decoder, examples, examples, examples).judge()
    assert score(lambda batch: judge(params, batch), examples).accuracy == 0.5


def test_scores_weigh_parts_by_what_is_in_them():
    """250 examples in parts of 100, 100 and 50; of generation, by their tokens."""
    targets = np.zeros((250, 1, 4), bool)
    targets[:, :, 2:], targets[200:, :, 1] = True, True
    examples = Examples(np.zeros((250, 1, 4), np.int32), targets, targets, np.arange(250))
    judged = lambda batch: (float(batch.labels[0]), float(batch.labels[0] == 0))  # noqa: E731
    assert score(judged, examples) == ((100 * 200 + 200 * 150) / 550, 100 / 250)


@pytest.mark.slow
def test_the_small_model_learns_its_text():
    content = np.frombuffer(b"the cat sat on the mat. " * 200 + b"a dog lay in the sun. " * 200, np.uint8)
    text = Text(content, np.where(np.arange(content.size) < 24 * 200, ord("c"), ord("d")).astype(np.uint8))
    settings = WarmStart(layers=1, width=16, steps=300, batch_size=16, length=32, learning_rate=0.02)
    decoder, params = transformer.make_decoder(settings.model), train(settings, text)
    pieces = (
        (b"the cat sat on the ma", "t"),
        (b"the mat. the cat sat on the mat. t:", "c"),
        (b"sun. a dog lay in the sun. a dog l:", "d"),
    )
    for piece, following in pieces:
        tokens = jnp.asarray([[*ByteTokenizer.prefix, *piece]])
        assert int(apply(decoder, params, tokens, jnp.ones(tokens.shape, bool))[0, -1].argmax()) == ord(following)


def test_one_file_is_split(tmp_path):
    write(tmp_path, all=25)
    parts = read_splits(tmp_path / "all.jsonl")
    texts = [record.fields["text"] for part in parts for record in part]
    assert list(map(len, parts)) == [21, 2, 2] and len(set(texts)) == 25


def test_batches_differ_by_seed(whole):
    train = whole[0].task.train
    orders = [batch_of(train, 0, size=12, seed=seed).tokens.tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


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
        (["--batch-size", "0"], "batch_size must be an integer >= 1, got 0."),
        (["--sigma", "0"], "sigma must be a finite number > 0, got 0.0."),
        (["--learning-rate", "inf"], "learning_rate must be a finite number > 0, got inf."),
        (["--options", "rank"], "options must be such as rank=4, got 'rank'."),
        (["--options", "rank=4"], "options: recipe mezo has no 'rank', it has"),
        (["--recipe", "lozo", "--options", "sigma=4"], "options: recipe lozo has no 'sigma', it has"),
        (["--recipe", "lozo", "--options", "rank=many"], "rank must be an integer >= 1, got 'many'."),
        (["--recipe", "lozo", "--options", "rank=0"], "rank must be an integer >= 1, got 0."),
        (["--model", "nowhere"], "learning_rate must be given: none is known for mezo on this model."),
        (["--model", "nowhere", "--learning-rate", "1"], "model must be a folder with a checkpoint, got nowhere."),
        (["--recipe", "adam", "--sigma", "1"], "--sigma has no effect with --recipe adam: it belongs to mezo"),
        (["--recipe", "adam", "--resume"], "--resume has no effect with --recipe adam: it belongs to mezo"),
        (["--recipe", "adam", "--objective", "accuracy"], "objective accuracy has no gradient: adam needs"),
        (["--label-words", "0", "a", "1", "b"], "label_words need a template, such as '{text} It was'."),
        (["--label-words", "0", "a", "1", "b", "--answer", "{a}"], "label_words make a classification and answer a generation"),
        (["--template", "{text"], "template '{text' is not well formed"),
        (["--data", "nowhere"], "data must be a JSONL file or a folder with train, validation and test, got nowhere."),
        (["--data", "."], "data . has no train.jsonl, validation.jsonl, test.jsonl."),
        (["--data", "data/test.jsonl"], "data data/test.jsonl has 6 records, 10 are needed to split one file."),
        (["--template", "{title}"], "data/train.jsonl, line 1: field 'title' is missing; the line has text, label."),
        (["--batch-size", "13"], "batch_size must be at most the 12 training examples, got 13."),
        (["--mesh", "pairs=2"], "mesh must be such as population=4,data=2, with axes out of population, data, model, got"),
        (["--mesh", "population=64"], "mesh 'population=64' has 64 devices, this run has"),
        (["--mesh", "model=1", "--offload"], "blocks are offloaded over mesh axes population and data, got 'model'."),
        (["--recipe", "lozo_m", "--offload"], "momentum cannot be deferred block by block"),
        (["--recipe", "grzo", "--directions", "3"], "estimator grzo gives every direction an example: batch leaves need"),
        (["--recipe", "fzoo", "--forwards", "8"], "forwards 8 are fewer than the 9 of one step of fzoo."),
        (["--recipe", "fzoo", "--directions", "1"], "estimator fzoo divides by the spread of the losses"),
        (["--start.width", "20"], "start.width must be a multiple of 16, got 20."),
    ],
)
def test_bad_options_end_with_a_clear_error(arguments, words, place, capsys):
    options = [*place[1][: len(START)], "--data", "data", "--batch-size", "4", "--folder", str(place[0] / "bad")]
    options = drop_options(options, parse([*options, *arguments]).ignored())
    with pytest.raises(SystemExit) as ended:
        zo.main([*options, *arguments])
    assert str(ended.value).startswith(f"error: {words}") and "\n" not in str(ended.value)
    assert "{" not in capsys.readouterr().out
