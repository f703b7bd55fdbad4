"""Schedules of sigma and of the step size of `experiments.rl`: their values, their length, and runs that resume."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from eggroll.experiments.common.schedules import make_schedule
from eggroll.experiments.rl import __main__ as rl
from eggroll.experiments.rl import evolution
from eggroll.experiments.rl.config import Config
from eggroll.experiments.rl.evolution import make_optimizer, make_schedules, planned_generations
from eggroll.experiments.rl.inputs import load

pytestmark = pytest.mark.usefixtures("standard_promotion")  # optax.adam relies on the former
SMALL = {"population_size": 4, "episodes": 2, "max_steps": 10, "hidden_sizes": (4,)}
OPTIONS = [
    "--population-size",
    "4",
    "--episodes",
    "2",
    "--max-steps",
    "10",
    "--hidden-sizes",
    "4",
    "--evaluation-episodes",
    "4",
]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("exponential", [8.0, 4.0, 2.0, 1.0, 0.5, 0.25]),
        ("linear", [8.0, 6.5, 5.0, 3.5, 2.0, 2.0]),
        ("cosine", [8.0, 5.0 + 3.0 * 0.5**0.5, 5.0, 5.0 - 3.0 * 0.5**0.5, 2.0, 2.0]),
    ],
)
def test_a_schedule_ends_with_the_last_generation(kind, expected):
    """Five generations from 8 to a fourth of it, and one beyond."""
    schedule = make_schedule(kind, 8.0, decay=0.5, end=0.25, generations=5)
    np.testing.assert_allclose([float(schedule(jnp.int32(step))) for step in range(6)], expected, rtol=1e-6)
    assert make_schedule("exponential", 8.0, decay=1.0, end=0.25, generations=5) == 8.0


def test_the_number_of_generations_follows_the_budget():
    """A generation of 4 members has at most 4 x 2 x 10 steps."""
    config = Config(**SMALL, env_steps=321, sigma=0.5, sigma_schedule="linear", sigma_end=0.2, learning_rate_schedule="cosine")
    task = load(config)
    assert planned_generations(config, task) == 5
    sigma, rate = make_schedules(config, task)
    assert [float(sigma(0)), float(sigma(4))] == pytest.approx([0.5, 0.1])
    assert [float(rate(0)), float(rate(4))] == pytest.approx([0.05, 0.005])
    assert planned_generations(Config(**SMALL, generations=7), task) == 7


@pytest.mark.parametrize(("kind", "factor"), [("exponential", 0.5 * 0.9**2), ("linear", 1 / 8)])
def test_sgd_is_in_the_papers_scale_and_follows_sigma(kind, factor):
    """One step moves by lr_t sigma_t^2 sqrt(N) g: 0.1 * 0.2^2 * 8 * g at first."""
    sigma, rate = (make_schedule(kind, first, decay=decay, end=0.5, generations=2) for first, decay in ((0.2, 0.9), (0.1, 0.5)))
    optimizer, gradient = make_optimizer(Config(optimizer="sgd", population_size=64), sigma, rate), {"w": jnp.ones(1)}
    first, state = optimizer.update(gradient, optimizer.init(gradient))
    second, _ = optimizer.update(gradient, state)
    assert [float(first["w"][0]), float(second["w"][0])] == pytest.approx([-0.032, -0.032 * factor])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--env-steps", "80"], "raise --env-steps 80: a generation has up to 80."),
        (["--generations", "1"], "raise --generations 1."),
    ],
)
def test_a_schedule_of_one_generation_is_a_clear_error(arguments, words, tmp_path):
    with pytest.raises(SystemExit) as ended:
        rl.main([*OPTIONS, *arguments, "--sigma-schedule", "cosine", "--folder", str(tmp_path)])
    assert str(ended.value) == f"error: --sigma-schedule cosine needs at least 2 generations; {words}"


@pytest.mark.slow
def test_a_run_with_schedules_resumes_bit_for_bit(tmp_path, capsys, monkeypatch):
    options = [*OPTIONS, "--generations", "5", "--sigma-schedule", "cosine", "--learning-rate-schedule", "linear"]
    options += ["--noise-reuse", "2", "--target", "inf", "--checkpoint-every", "2"]
    rl.main([*options, "--folder", str(tmp_path / "whole")])
    stopped = evolution.train
    with monkeypatch.context() as patch:
        patch.setattr(evolution, "train", lambda *args, generations, **more: stopped(*args, generations=3, **more))
        rl.main([*options, "--folder", str(tmp_path / "stopped")])
    rl.main([*options, "--folder", str(tmp_path / "stopped"), "--resume"])
    assert "schedules end after 5 generations" in capsys.readouterr().out
    assert (tmp_path / "whole/journal.bin").read_bytes() == (tmp_path / "stopped/journal.bin").read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "stopped/metrics.jsonl").read_text().splitlines()]
    assert [line["sigma"] for line in lines][::4] == pytest.approx([0.1, 0.01])
