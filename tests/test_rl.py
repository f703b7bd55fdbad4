"""The reinforcement-learning experiment from its command line to its artefacts."""

import contextlib
import functools
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
from experiments import rl
from experiments.common.checkpoint import load_checkpoint
from experiments.common.run import print_summary, run_folder

pytestmark = pytest.mark.usefixtures("standard_promotion")  # optax.adam relies on it
SMALL = ["--population-size", "16", "--generations", "4", "--hidden-sizes", "8", "--evaluation-episodes", "3"]
SMALL += ["--check-every", "2", "--target", "501"]


def run(capsys, *arguments):
    """Summary of the experiment with these options."""
    rl.main(arguments)
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """Summary and folder of one small run."""
    folder = tmp_path_factory.mktemp("rl")
    out = io.StringIO()
    with jax.numpy_dtype_promotion("standard"), contextlib.redirect_stdout(out):
        rl.main([*SMALL, "--folder", str(folder)])
    return json.loads(out.getvalue().splitlines()[-1]), folder


def test_summary_and_artefacts(small_run):
    summary, folder = small_run
    assert list(summary) == ["env", "algorithm", "mean_return", "generations", "env_steps", "seconds"]
    assert (summary["env"], summary["algorithm"], summary["generations"]) == ("CartPole-v1", "eggroll", 4)
    assert 1 <= summary["mean_return"] <= 500 and summary["seconds"] > 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert ["held_out_return" in line for line in lines] == [False, True, False, True]
    # One reward per step in CartPole: the steps of a generation are the sum of its members' returns.
    assert summary["env_steps"] == pytest.approx(sum(16 * line["mean_fitness"] for line in lines))
    assert (folder / "fitness.png").exists()


def test_the_same_seed_is_the_same_run(small_run, capsys, tmp_path):
    again = run(capsys, *SMALL, "--folder", str(tmp_path))
    assert again | {"seconds": 0} == small_run[0] | {"seconds": 0}
    first, second = ((folder / "metrics.jsonl").read_text().splitlines() for folder in (small_run[1], tmp_path))
    assert [json.loads(line)["mean_fitness"] for line in first] == [json.loads(line)["mean_fitness"] for line in second]


def test_checkpoint_restores_the_policy(small_run):
    summary, folder = small_run
    task = rl.make_task(rl.Config(hidden_sizes=(8,)))
    like = {
        "params": task.init_params(key=jax.random.key(9)),
        "statistics": envs.initial_statistics((4,))._asdict(),
    }
    restored = load_checkpoint(folder / "checkpoint", like)
    statistics = envs.ObservationStatistics(**restored["statistics"])
    assert float(statistics.number) == summary["env_steps"]
    evaluation_key = jax.random.split(jax.random.key(0), 4)[3]
    play = jax.jit(functools.partial(task.play, episodes=3, sampled=False))
    played = play(restored["params"], statistics, evaluation_key)
    assert float(played.total_reward.mean()) == pytest.approx(summary["mean_return"])


def test_statistics_are_gathered_through_the_engine():
    """The engine's sum over the population equals the sum over members played one by one."""
    config = rl.Config(population_size=6, hidden_sizes=(4,), episodes=2)
    task = rl.make_task(config)
    es = rl.make_strategy(config, task)
    state = es.init(task.init_params(key=jax.random.key(0)), key=jax.random.key(1))
    statistics = envs.ObservationStatistics(jnp.float32(9), jnp.full(4, 0.01), jnp.full(4, 0.1))
    _, metrics = es.step(state, statistics)
    evaluation_key = jax.random.fold_in(jax.random.split(state.key, 3)[1], 0)

    @jax.jit
    def play(index):
        key = jax.random.fold_in(evaluation_key, index // 2)
        return task.play(es.ask(state).member(index), statistics, key, episodes=2, sampled=False)

    members = [play(jnp.int32(index)) for index in range(6)]
    expected = jax.tree.map(lambda *x: np.sum(x, axis=(0, 1)), *[member.sums for member in members])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), metrics.aux, expected)
    np.testing.assert_allclose(metrics.fitness, [member.total_reward.mean() for member in members])


def test_continuous_sampled_actions_without_normalisation():
    task = rl.make_task(rl.Config(env="Pendulum-v1", sampled_actions=True, normalise=False, hidden_sizes=(8,)))
    params, statistics = task.init_params(key=jax.random.key(0)), envs.initial_statistics((3,))
    play = jax.jit(functools.partial(task.play, episodes=4), static_argnames="sampled")
    sampled, other = (play(params, statistics, jax.random.key(1), sampled=sampled) for sampled in (True, False))
    assert sampled.steps.tolist() == other.steps.tolist() == [200] * 4
    assert (sampled.total_reward != other.total_reward).all() and (sampled.total_reward < 0).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--env", "CartPole"], "error: env must name an environment, got 'CartPole'; did you mean CartPole-v1"),
        (["--episodes", "0"], "error: episodes must be an integer >= 1, got 0."),
        (["--generations", "-1"], "error: generations must be an integer >= 1, got -1."),
        (["--check-every", "0"], "error: check_every must be an integer >= 1, got 0."),
        (["--evaluation-episodes", "0"], "error: evaluation_episodes must be an integer >= 1, got 0."),
        (["--learning-rate", "0"], "error: learning_rate must be a finite number > 0, got 0.0."),
        (["--hidden-sizes", "8", "0"], "error: hidden_sizes must be integers >= 1, got (8, 0)."),
        (["--population-size", "7"], "error: population_size must be an even integer >= 2"),
        (["--sigma", "-0.1"], "error: sigma must be a finite number > 0"),
        (["--rank", "0"], "error: rank must be an integer >= 1, got 0."),
    ],
)
def test_bad_options_end_with_one_sentence(arguments, words, capsys):
    with pytest.raises(SystemExit) as ended:
        rl.main(arguments)
    assert str(ended.value).startswith(words) and "\n" not in str(ended.value)
    assert capsys.readouterr().out == ""


def test_summary_is_one_line_of_json(capsys):
    print_summary({"a": float("nan"), "b": np.float32(1.5), "c": jnp.arange(2), "d": [float("inf"), None, True], "e": "x"})
    assert capsys.readouterr().out == '{"a": null, "b": 1.5, "c": [0, 1], "d": [null, null, true], "e": "x"}\n'


def test_run_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_folder("first").resolve() == tmp_path / "runs" / "first"
    assert run_folder("elsewhere/second").resolve() == tmp_path / "elsewhere" / "second"
    assert run_folder(tmp_path / "third").is_dir() and run_folder("first").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_cartpole_is_solved(seed, capsys, tmp_path):
    summary = run(capsys, "--seed", str(seed), "--folder", str(tmp_path))
    assert summary["mean_return"] >= 475 and summary["seconds"] < 60
