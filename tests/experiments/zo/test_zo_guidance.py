"""What a run says of itself: suggested learning rate, projected gradient, a loss that grows, a model that does not fit."""

import json
import math
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eggroll import zo as library
from eggroll.experiments.common.loop import Checks, seconds_spent
from eggroll.experiments.zo import __main__ as zo
from eggroll.experiments.zo import capacity, inputs
from eggroll.experiments.zo.config import Config, parse
from eggroll.experiments.zo.evaluation import best_step
from eggroll.experiments.zo.guidance import describe, warn_of_spacing
from eggroll.experiments.zo.inputs import load
from eggroll.experiments.zo.problem import Score
from eggroll.experiments.zo.progress import GROWING, Progress, projected_gradient, why_ended
from eggroll.experiments.zo.warm_start import WarmStart, init
from eggroll.llm import hf
from eggroll.zo import room
from tests.experiments.zo.test_zo_experiment import START, write
from tests.test_readme import code_blocks


def test_a_probe_suggests_a_learning_rate_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = write(tmp_path / "data", train=12, validation=6, test=6)
    options = ["--template", "{text}:", "--batch-size", "4", "--max-length", "12", "--forwards", "1"]  # a budget of no step
    zo.main([*START, "--data", str(data), *options, "--probe"])
    out = capsys.readouterr().out.splitlines()
    summary = json.loads(out[-1])
    assert summary["projected_gradient"] > 0 and summary["recipe"] == "mezo"
    assert out[-2].startswith(f"projected gradient {summary['projected_gradient']:.3g}, curvature ")
    assert ("try --learning-rate" in out[-2]) == (summary["learning_rate"] is not None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "runs"]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["zo-start"]  # the small model


def test_what_a_probe_found_in_words():
    found = library.Guidance(0.7, 24.8, 1900.0, 0.9, 4.7e-4, 4.7e-5)
    start = "projected gradient 24.8, curvature 1.9e+03 along 8 directions"
    assert describe(found, directions=8, rate=None) == f"{start}; one step gains most at 4.7e-04, try --learning-rate 4.7e-05"
    assert describe(found, directions=8, rate=1e-6).endswith("4.7e-05; this run has 1e-06, 47 times less")
    none = found._replace(learning_rate=math.nan, reason="a loss was not finite; lower sigma")
    assert describe(none, directions=8, rate=1e-6).endswith("no learning rate is suggested: a loss was not finite; lower sigma")


def test_projected_gradient_of_a_step():
    minus_losses = -np.array([1.2, 1.0, 0.9, 1.3])
    assert projected_gradient(minus_losses, sigma=0.1, signs=2) == pytest.approx(math.sqrt((1 + 4) / 2))
    assert projected_gradient(minus_losses[:2], sigma=0.1, signs=1) == pytest.approx(2)


def test_noise_below_the_spacing_of_bfloat16_is_a_warning():
    """Of weights in [0.5, 1) that is 2^-8: sigma must be at least half of it."""
    leaves = [types.SimpleNamespace(role=role) for role in ("dense", "dense", "low-rank", "frozen")]
    params = [jnp.full(8, value, jnp.bfloat16) for value in (0.75, -0.75, 4.0, 4.0)]
    with pytest.warns(UserWarning, match=r"^67 % of the perturbed weights .* above twice sigma 0.0019, .* raise --sigma, or"):
        warn_of_spacing(params, types.SimpleNamespace(leaves=leaves), 0.0019)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_spacing(params, types.SimpleNamespace(leaves=leaves), 2.0**-9)
        warn_of_spacing([leaf.astype(jnp.float32) for leaf in params], types.SimpleNamespace(leaves=leaves), 1e-4)


def step(progress, number, loss):
    record = types.SimpleNamespace(mean_fitness=-loss, generation=number, skipped=False, extra={}, seconds=2.0)
    progress(None, record)
    return record


def test_a_loss_that_grows_is_said_once(capsys):
    progress = Progress(lambda state: Score(0.5, 0.75), Checks(steps=100, checks=1), learning_rate=1e-3, forwards=2)
    progress.suggested = 2e-5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number, loss in enumerate([1.0, 2.0, 3.0, 2.5, *range(3, 2 + GROWING)]):
            step(progress, number, loss)
    words = r"grew in 10 steps in a row, from 2.5 to 20 after step 14: .* too high, try --learning-rate 2e-05 instead of 0.001"
    with pytest.warns(UserWarning, match=words):
        step(progress, 13, 20.0)
    for number in range(14, 50):
        step(progress, number, float(number + 10))
    record = step(progress, 99, 1.0)
    assert record.extra.pop("seconds_spent") > 0
    assert record.extra == {"loss": 1.0, "steps": 100, "validation_loss": 0.5, "validation_accuracy": 0.75}
    assert "step 100: training loss 1, validation loss 0.5 accuracy 0.750" in capsys.readouterr().out
    assert progress.words(record) == "loss 1  validation loss 0.5 accuracy 0.750  1 forwards/s"


def test_the_seconds_of_a_resumed_run_are_those_of_all_its_steps(tmp_path):
    """Metrics of an earlier version have the seconds of the steps alone."""
    rows = [{"generation": n, "seconds": 2.0} for n in range(2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    progress = Progress(lambda state: Score(0.5, 0.75), Checks(steps=100, checks=1), learning_rate=None)
    progress.begin(seconds_spent(tmp_path))
    line = step(progress, 2, 1.0).extra
    assert 4 <= line["seconds_spent"] <= progress.seconds < 5
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"generation": 2, **line}]))
    assert seconds_spent(tmp_path) == line["seconds_spent"] and seconds_spent(tmp_path / "new") == 0


def test_why_a_run_ended(capsys):
    assert why_ended(Config(steps=6), 6, forwards=2, seconds=3.0) == "steps"
    assert why_ended(Config(forwards=10), 3, forwards=3, seconds=3.0) == "forwards"
    assert capsys.readouterr().out.splitlines() == [
        "ended after 6 steps (12 forwards) and 3 s of training: --steps 6 are done",
        "ended after 3 steps (9 forwards) and 3 s of training: --forwards 10 leave no other of 3",
    ]


def test_the_best_step_is_that_of_the_lowest_validation_loss():
    rows = [{"generation": 0}, {"generation": 1, "validation_loss": 0.5, "validation_accuracy": 0.5}]
    rows += [{"generation": 3, "validation_loss": 0.5, "validation_accuracy": 0.25}, {"generation": 5, "validation_loss": None}]
    summary = {"steps": 6, "validation_loss_before": 0.7, "validation_accuracy_before": 0.75}
    assert best_step(rows, summary, by="loss") == 4 and best_step(rows, summary, by="accuracy") == 0
    assert best_step([], {"steps": 6}, by="loss") == 6


@pytest.mark.parametrize(
    ("arguments", "free", "words"),
    [
        ([], 0.9, r"holds the parameters\. .* too few\. Try a smaller model\."),
        (
            ["--mesh", "population=2"],
            1.9,
            r"each device holds .* on 2 cpu devices; .* Try a mesh of fewer devices\.",
        ),
        (["--recipe", "adam"], 3.9, r"holds parameters, gradient and moments of adam\. .* Try a recipe other than adam\."),
        (["--model", "x", "--recipe", "adam"], 3.9, r"moments of adam\. .* Try a recipe other than adam\."),
        (["--model", "x", "--recipe", "adam", "--dtype", "bfloat16"], 3.9, r"of adam\. .* Try a recipe other than adam\."),
        (
            ["--offload"],
            1.8,
            r"1 of 1 blocks; the host holds all blocks and, at .*, the model\. .* Try --transfer-dtype bfloat16\.",
        ),
        (["--evaluate", "--offload"], 1.8, r"and 1 of 1 blocks; the host holds all blocks and, at start and end, the model\."),
        (["--model", "x"], 0.9, r"\. Try --dtype bfloat16 --precision stochastic\."),
        (
            ["--model", "x", "--dtype", "bfloat16"],
            1.4,
            r"float32 masters of them\. .* Try --offload, or --precision stochastic\.",
        ),
        (
            ["--model", "x", "--dtype", "bfloat16", "--precision", "stochastic"],
            0.4,
            r"the parameters\. .* Try a smaller model\.",
        ),
        (["--model", "x", "--evaluate"], 0.9, r"\. Try --dtype bfloat16\."),
        (["--model", "x", "--offload"], 1.8, r"\. Try --transfer-dtype bfloat16, or --dtype bfloat16\."),
    ],
)
def test_a_model_that_does_not_fit_is_refused_before_it_is_read(arguments, free, words, monkeypatch):
    config, model = parse([*START, *arguments]), WarmStart(steps=0, width=16, layers=1).model
    whole = 4 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(capacity.shapes_of(config, model)))
    monkeypatch.setattr(room, "free_host_bytes", lambda: int(free * whole))
    with pytest.raises(ValueError, match=f"the model does not fit: .*{words}"):
        capacity.check_capacity(config, model)
    monkeypatch.setattr(room, "free_host_bytes", lambda: int((free + 1.2) * whole))
    capacity.check_capacity(config, model)


def test_a_run_checks_that_its_model_fits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(room, "free_host_bytes", lambda: 1000)
    monkeypatch.setattr("eggroll.experiments.zo.inputs.hf.load", None)  # no weight is read
    with pytest.raises(ValueError, match="the model does not fit"):
        load(parse([*START, "--data", str(write(tmp_path / "data", train=12, validation=6, test=6))]))


def test_every_process_has_the_shipped_task_of_a_run_that_writes_nothing(tmp_path, monkeypatch):
    """The temporary folder is another one in each, and only the first process writes into a shared one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inputs, "first_does", lambda function: None)
    assert len(load(parse(START)).task.test.labels) == 1000


@pytest.mark.slow
def test_the_example_of_the_docs_learns(tmp_path, monkeypatch, standard_promotion):
    monkeypatch.chdir(tmp_path)
    start = WarmStart(layers=1, width=16)
    hf.save(tmp_path / "checkpoint", start.model, init(start))
    (source,) = (block for block in code_blocks("docs/zeroth_order.md", "python") if "hf.load(" in block)
    names: dict = {}
    exec(compile(source.replace("path/to/checkpoint", str(tmp_path / "checkpoint")), "docs/zeroth_order.md", "exec"), names)
    assert names["history"][-1].mean_fitness > names["history"][0].mean_fitness
    assert hf.load(tmp_path / "tuned")[0] == start.model
