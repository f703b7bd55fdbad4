"""The estimator experiment: its statistics on known numbers, its theory on small runs, its artefacts."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from eggroll import LowRank
from eggroll.experiments.estimator.__main__ import Config, main
from eggroll.experiments.estimator.objectives import cubic, curved, curved_cosine
from eggroll.experiments.estimator.replicates import mean_and_error, power_law
from eggroll.experiments.estimator.studies import bias_by_rank, cosine_by_sigma, error_by_population
from eggroll.lazy.planning import make_plan

Z = 4.5  # replicate standard errors; a correct run with these fixed keys is far inside


def test_power_law_of_an_exact_power():
    slope, error = power_law([1, 2, 4], [8.0, 2.0, 0.5], [0.8, 0.2, 0.05])
    assert slope == pytest.approx(-2.0)
    assert error == pytest.approx(0.1 / (2 * np.log(2) ** 2) ** 0.5)  # relative errors of 0.1, spread 2 log(2)^2


def test_mean_and_error_of_a_table():
    assert mean_and_error(np.array([1.0, 2.0, 3.0, 4.0])) == pytest.approx((2.5, (5 / 3) ** 0.5 / 2))


@pytest.mark.parametrize("objective", [cubic(4, sigma=1.0, key=jax.random.key(0)), curved(4, key=jax.random.key(0))])
def test_matrices_get_low_rank_noise(objective):
    plan = make_plan(objective.fitness, objective.params, perturbation=LowRank(2, "normal"))
    assert [leaf.role for leaf in plan.leaves] == ["low-rank"]


@pytest.mark.slow
def test_bias_is_the_one_of_its_rank_and_not_of_another():
    curves = bias_by_rank([1, 4], size=8, sigma=1.0, num_pairs=1024, replicates=32, key=jax.random.key(0))
    for curve in curves:
        for point in curve.points:
            assert abs(point.value - point.theory) < Z * point.error
        first, last = curve.points
        assert abs(first.value - last.theory) > Z * first.error  # negative control: noise of rank 1 is not of rank 4


def test_cosine_falls_where_sigma_passes_the_square_root_of_the_dimension():
    (curve,) = cosine_by_sigma([0.01, 0.125, 1.0], [8], rank=1, num_pairs=512, replicates=8, key=jax.random.key(0))
    for point in curve.points:
        assert abs(point.value - point.theory) < Z * point.error + 1e-3
    assert curve.points[0].theory > 0.99 > 0.9 > curve.points[1].theory > 0.1 > curve.points[2].theory


def test_curved_cosine_at_high_rank_is_the_dense_one():
    assert curved_cosine(8, sigma=0.1, rank=10**6) == pytest.approx((1 + (0.01 * 66) ** 2) ** -0.5, rel=1e-5)


@pytest.mark.slow
def test_error_falls_with_the_population():
    for curve in error_by_population([32, 512], width=8, sigma=0.01, rank=1, replicates=16, key=jax.random.key(0)):
        assert curve.slope == pytest.approx(-1.0, abs=Z * curve.slope_error)


@pytest.mark.slow
def test_run_writes_artefacts_and_ends_with_json(tmp_path: Path, capsys):
    config = Config(
        ranks=(1, 2),
        bias_size=4,
        bias_pairs=256,
        bias_replicates=16,
        sigmas=(0.1,),
        sizes=(4,),
        cosine_pairs=64,
        cosine_replicates=4,
        population_sizes=(16, 64),
        width=4,
        error_replicates=8,
        run=str(tmp_path / "run"),
    )
    main(config)
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"bias_slope", "bias_slope_rademacher", "variance_slope", "seconds", "figure"} <= set(last)
    assert Path(last["figure"]).read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["config"]["seed"] == dataclasses.asdict(config)["seed"]
    assert "rademacher" in (tmp_path / "run" / "table.txt").read_text()
