"""The reinforcement-learning experiment from its command line to its artefacts."""

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eggroll import copy_state, envs
from eggroll.devices import chunking
from eggroll.envs import Continuous, MultiDiscrete, PerAgent
from eggroll.experiments.rl import __main__ as rl
from eggroll.experiments.rl import evolution, inputs
from eggroll.experiments.rl.config import Config, parse, restore_config
from eggroll.experiments.rl.evolution import make_strategy
from eggroll.experiments.rl.finished import load_run
from eggroll.experiments.rl.inputs import load
from eggroll.experiments.rl.presets import PAPER
from eggroll.experiments.rl.problem import HeldOutChecks, is_above
from eggroll.experiments.rl.uniform import uniform_action
from eggroll.journal import __main__ as journal
from eggroll.noise import addresses
from eggroll.runs.carried import pack

pytestmark = pytest.mark.usefixtures("standard_promotion")  # optax.adam relies on the former
SMALL = ["--population-size", "16", "--generations", "4", "--hidden-sizes", "8", "--evaluation-episodes", "50"]
LIMITS = np.array([-1, -2, -np.inf], np.float32), np.array([3, -1, np.inf], np.float32)
SMALL += ["--env-steps", "3000", "--checks", "20", "--target", "501"]


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
    names = ["env", "algorithm", "mean_return", "random_return", "above_random", "generations", "env_steps", "invalid"]
    names += ["seconds", "generation_seconds", "ended", "best_return", "best_check", "best_env_steps"]
    names += ["unusual", "parameters"]
    assert list(summary) == [*names, "peak_mib"] and 15 < summary["random_return"] < 35
    assert summary["ended"] == "generations" and summary["parameters"] == {"best": "best", "last": "checkpoint"}
    assert (summary["env"], summary["algorithm"], summary["generations"]) == ("CartPole-v1", "eggroll", 4)
    assert 1 <= summary["mean_return"] <= 500 and summary["seconds"] > 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    checks, steps = ["held_out_return" in line for line in lines], [0] + [line["env_steps"] for line in lines]
    assert checks == [before // 150 < after // 150 for before, after in itertools.pairwise(steps)] and any(checks)
    # One reward per step in CartPole: the steps of a generation are the sum of its members' returns.
    assert summary["env_steps"] == pytest.approx(sum(16 * line["mean_fitness"] for line in lines))
    found = {line["held_out_return"]: line["env_steps"] for line in lines if "held_out_return" in line}
    assert (summary["best_check"], summary["best_env_steps"]) == max(found.items())
    assert (folder / "fitness.png").exists()


def test_a_target_that_is_never_met_is_not_the_default_one():
    """Also as JSON, which has no infinity."""
    for target, max_steps, stored in ((float("inf"), None, None), (None, None, 495.0), (None, 50, None), (20.0, 50, 20.0)):
        options = json.loads(json.dumps(Config(target=target, max_steps=max_steps).options()))
        assert options["target"] == stored and restore_config(options).options() == options


def test_a_return_alone_is_not_above_others():
    """Two returns of 0 and 2 have the standard error 1: their mean has to be above 2."""
    two = jnp.float32([0.0, 2.0])
    assert not is_above(jnp.ones(1), jnp.zeros(1))
    assert not is_above(two + 0.9, jnp.zeros(2)) and is_above(two + 1.1, jnp.zeros(2))


def test_a_drawing_that_fails_after_training_is_a_warning(tmp_path):
    def render(*given, **named):
        raise OSError("no space left")

    with pytest.warns(UserWarning, match="no episode was drawn: no space left"):
        rl._render(SimpleNamespace(render=render), SimpleNamespace(params=None, statistics=None), tmp_path, key=None)


def test_a_drawing_that_cannot_work_is_an_error_before_training(monkeypatch, tmp_path):
    environment = dataclasses.replace(envs.make("CartPole-v1"), draw=lambda state: np.zeros((2, 2, 3)))
    monkeypatch.setattr(inputs.envs, "make", lambda name, max_steps: environment)
    with pytest.raises(ValueError, match="draw must return a picture"):
        rl.run(Config(render=True, folder=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_looks_at_its_first_generation_too():
    progress = evolution._Progress(
        SimpleNamespace(environment=SimpleNamespace(observation_shape=(2,))), None, look=None, most_steps=1
    )
    progress.remember(range(40))
    progress.remember([40])
    assert progress._records == [0, *range(21, 41)]


def test_the_last_of_the_checks_is_due_at_the_end(tmp_path):
    """7 x (115200 / 7) is above 115200 in floats."""
    played = SimpleNamespace(mean_return=lambda *_, **__: np.nan)
    checks = HeldOutChecks(played, tmp_path, Config(env_steps=115_200, checks=7), key=jax.random.key(0))
    assert checks(None, None, env_steps=115_199) and checks.done == 6 and checks.steps_to_next(115_199) == 1
    assert checks(None, None, env_steps=115_200) and checks.done == 7


@pytest.mark.slow
def test_the_same_seed_is_the_same_run(small_run, capsys, tmp_path):
    again = run(capsys, *SMALL, "--folder", str(tmp_path))
    measured = {"seconds": 0, "generation_seconds": 0, "peak_mib": 0}
    assert again | measured == small_run[0] | measured
    first, second = ((folder / "metrics.jsonl").read_text().splitlines() for folder in (small_run[1], tmp_path))
    assert [json.loads(line)["mean_fitness"] for line in first] == [json.loads(line)["mean_fitness"] for line in second]


@pytest.mark.slow
def test_a_run_that_stopped_goes_on_bit_for_bit(small_run, capsys, tmp_path):
    """Two generations, then the rest: the same returns, counts and metrics as in one go."""
    options = [*SMALL, "--folder", str(tmp_path), "--checkpoint-every", "2"]
    run(capsys, *options, "--env-steps", "150")  # it stops early; another budget is another run
    with pytest.raises(SystemExit, match=r"other settings: env_steps \(was 150, is 3000\)"):
        rl.main([*options, "--resume"])
    capsys.readouterr()
    stopped = evolution.train
    with pytest.MonkeyPatch.context() as patch:

        def two_generations(*args, generations, **more):
            return stopped(*args, generations=2, **more)

        patch.setattr(evolution, "train", two_generations)
        assert run(capsys, *options)["generations"] == 2
    remembered, remember = [], evolution._Progress.remember
    with pytest.MonkeyPatch.context() as patch:

        def spy(self, records):
            remembered.append([record.generation for record in records])
            remember(self, records)

        patch.setattr(evolution._Progress, "remember", spy)
        whole = run(capsys, *options, "--resume")
    assert remembered[0] == [0, 1]  # what is unusual is judged from the first generation on
    measured = {"seconds": 0, "generation_seconds": 0, "peak_mib": 0}
    assert whole | measured == small_run[0] | measured
    first, second = ((folder / "metrics.jsonl").read_text().splitlines() for folder in (small_run[1], tmp_path))
    assert [json.loads(line)["mean_fitness"] for line in first] == [json.loads(line)["mean_fitness"] for line in second]
    again = run(capsys, *options, "--resume")  # there is nothing left to do
    assert again | measured == whole | measured
    journal.main(["verify", str(tmp_path)])
    assert "2 checkpoints are rebuilt bit for bit" in capsys.readouterr().out


@pytest.mark.slow
def test_generations_on_the_device_are_the_same_run(capsys, tmp_path):
    """Scans end where a check may be due: the same checks, counts, metrics and journal as without them."""
    options, summaries = [*SMALL, *["--env-steps", "4000", "--checks", "4", "--max-steps", "20", "--generations", "60"]], []
    for on_device in (1, 4):
        summaries.append(run(capsys, *options, "--folder", str(tmp_path / f"{on_device}"), "--on-device", f"{on_device}"))
    measured = {"seconds": 0, "generation_seconds": 0, "peak_mib": 0}
    assert summaries[0] | measured == summaries[1] | measured
    assert (tmp_path / "1" / "journal.bin").read_bytes() == (tmp_path / "4" / "journal.bin").read_bytes()
    times = {"seconds": 0, "members_per_second": 0, "crc32": 0}
    texts = ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in "14")
    one, scanned = ([json.loads(line) for line in text] for text in texts)
    assert [line | times for line in one] == [line | times for line in scanned]
    assert sum("held_out_return" in line for line in one) == 4 and "held_out_return" in one[-1]
    assert len({line["seconds"] for line in scanned}) < len(scanned) == len({line["seconds"] for line in one})


def test_the_policy_of_a_run_is_loaded(small_run):
    summary, folder = small_run
    loaded = load_run(folder, parameters="last", env="CartPole-v1")
    assert float(loaded.statistics.number) == summary["env_steps"] and loaded.config.hidden_sizes == (8,)
    returns = loaded.returns()
    assert returns.size == 50 and float(returns.mean()) == pytest.approx(summary["mean_return"])


@pytest.mark.slow
def test_statistics_are_gathered_through_the_engine():
    """The engine's sum over the population equals the sum over members played one by one."""
    config = Config(population_size=6, hidden_sizes=(4,), episodes=2)
    task = load(config)
    es = make_strategy(config, task)
    state = es.init(task.init_params(key=jax.random.key(0)), key=jax.random.key(1))
    statistics = envs.ObservationStatistics(jnp.float32(9), jnp.full(4, 0.01), jnp.full(4, 0.1))
    _, metrics = es.step(copy_state(state), statistics)
    evaluation_key = jax.random.fold_in(addresses.stream_key(state.key, 1), 0)

    @jax.jit
    def play(index):
        key = jax.random.fold_in(evaluation_key, index // 2)
        return task.play(es.ask(state).member(index), statistics, key, episodes=2)

    members = [play(jnp.int32(index)) for index in range(6)]
    expected = jax.tree.map(lambda *x: np.sum(x, axis=(0, 1)), *[member.sums for member in members])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), metrics.aux.sums, expected)
    np.testing.assert_array_equal(metrics.aux.steps, [member.steps.sum() for member in members])
    np.testing.assert_allclose(metrics.fitness, [member.total_reward.mean() for member in members])


def test_continuous_sampled_actions_without_normalisation():
    options = {"env": "Pendulum-v1", "normalise": False, "hidden_sizes": (8,)}
    known = envs.ObservationStatistics(jnp.float32(9), jnp.ones(3), jnp.ones(3))
    returns = []
    for sampled in (True, False):
        task = load(Config(sampled_actions=sampled, **options))
        params, statistics = task.init_params(key=jax.random.key(0)), envs.initial_statistics((3,))
        played = jax.jit(functools.partial(task.play, episodes=4))(params, statistics, jax.random.key(1))
        assert played.steps.tolist() == [200] * 4 and (played.total_reward < 0).all()
        returns.append(played.total_reward)
        shifted = jax.jit(functools.partial(task.play, episodes=4))(params, known, jax.random.key(1))
        np.testing.assert_array_equal(shifted.total_reward, played.total_reward)
        np.testing.assert_allclose(shifted.sums.deviation, played.sums.deviation - 200, rtol=1e-4)  # around a mean of 1
    assert (returns[0] != returns[1]).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--env", "CartPole"], "error: env must name an environment, got 'CartPole'; did you mean CartPole-v1"),
        (["--seed", "-1"], "error: seed must be an integer from 0 to 4294967295, got -1."),
        (["--episodes", "0"], "error: episodes must be an integer >= 1, got 0."),
        (["--generations", "-1"], "error: generations must be an integer >= 1, got -1."),
        (["--checks", "0"], "error: checks must be an integer >= 1, got 0."),
        (["--evaluation-episodes", "0"], "error: evaluation_episodes must be an integer >= 1, got 0."),
        (["--learning-rate", "0"], "error: learning_rate must be a finite number > 0, got 0.0."),
        (["--hidden-sizes", "8", "0"], "error: hidden_sizes must be integers >= 1, got (8, 0)."),
        (["--population-size", "7"], "error: population_size must be an even integer >= 2"),
        (["--sigma", "-0.1"], "error: sigma must be a finite number > 0"),
        (["--rank", "0"], "error: rank must be an integer >= 1, got 0."),
        (
            ["--mesh", "population=1", "--on-device", "10"],
            "error: --on-device has no effect with --mesh, where generations run",
        ),
        (
            ["--network", "gru", "--hidden-sizes", "16", "--activation", "relu_layer_norm"],
            "error: --activation has no effect without a hidden layer that has one",
        ),
        (
            ["--hidden-sizes", "--activation", "relu_layer_norm"],
            "error: --activation has no effect without a hidden layer that",
        ),
        (["--mesh", "data=1"], "error: mesh must be such as population=4, with axes out of population, got 'data=1'."),
        (["--seeds", "0"], "error: seeds must be an integer >= 1, got 0."),
        (["--env-steps", "0"], "error: env_steps must be an integer >= 1, got 0."),
        (["--target", "nan"], "error: target must be a number, or inf, got nan."),
        (["--sigma-decay", "1.1"], "error: sigma_decay must be a number > 0 and <= 1, got 1.1."),
        (["--algorithm", "ppo", "--resume"], "error: --resume has no effect with --algorithm ppo: it belongs to eggroll"),
        (
            ["--shaping", "ranks"],
            "error: shaping must be one of centered_ranks, z_score, ",
        ),
        (
            ["--shaping", "group_relative"],
            "error: shaping must be one of centered_ranks, z_score, pair_sign, got 'group_relative'",
        ),
        (["--max-steps", "0"], "error: max_steps must be an integer >= 1, got 0."),
        (["--preset", "paper", "--env", "Acrobot-v1"], "error: preset paper has no row for env 'Acrobot-v1'; it has"),
        (
            ["--algorithm", "ppo", "--ppo.minibatches", "3"],
            "error: ppo.minibatches must divide the 2048 steps of",
        ),
    ],
)
def test_bad_options_end_with_a_clear_error(arguments, words, capsys):
    with pytest.raises(SystemExit) as ended:
        rl.main(arguments)
    assert str(ended.value).startswith(words) and "\n" not in str(ended.value)
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_a_population_too_large_for_memory_runs_in_chunks(capsys, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(evolution, "MANY_EPISODES", 16)
    monkeypatch.setattr(chunking, "free_bytes", lambda: 40_000)
    run(capsys, *SMALL, "--population-size", "256", "--generations", "1", "--folder", str(tmp_path))
    assert "256 members would need about" in caplog.text


@pytest.mark.slow
def test_random_policy_learns_nothing(capsys, tmp_path):
    summary = run(capsys, "--algorithm", "random", "--evaluation-episodes", "50", "--folder", str(tmp_path))
    assert summary["mean_return"] == summary["random_return"] and 15 < summary["mean_return"] < 35
    assert (summary["algorithm"], summary["generations"], summary["env_steps"]) == ("random", 0, 0)


@pytest.mark.parametrize("space", [Continuous((3,), *LIMITS), PerAgent(2, MultiDiscrete((2, 3)))], ids=["box", "agents"])
def test_uniform_actions_cover_the_space(space):
    draw = jax.vmap(lambda key: uniform_action(space, key=key))
    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 2000)))
    if isinstance(space, Continuous):
        assert (drawn[:, 0] >= -1).all() and (drawn[:, 0] <= 3).all() and drawn[:, 2].min() < -2
        error, std = np.abs(drawn.mean(axis=0)[[0, 2]] - [1, 0]), np.array([4 / 12**0.5, 1])
        assert (error < 5 * std / 2000**0.5).all()
    else:
        assert drawn.shape == (2000, 2, 2)
        counts = [np.bincount(drawn[:, agent, 1], minlength=3) for agent in range(2)]
        assert (np.abs(np.array(counts) - 2000 / 3) < 5 * np.sqrt(2000 * 2 / 9)).all()


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["openes", "ppo"])
def test_every_seed_is_a_run_of_its_own(algorithm, capsys, tmp_path):
    own = {"openes": SMALL, "ppo": ["--ppo.num-envs", "4", "--ppo.rollout-steps", "8", "--hidden-sizes", "8"]}[algorithm]
    options = ["--env-steps", "64", "--algorithm", algorithm, "--seed", "3", "--seeds", "2", "--folder", str(tmp_path)]
    options = [*own, *options]
    summary = run(capsys, *options)
    rows = summary["seeds"]
    assert [row["seed"] for row in rows] == [3, 4] and rows[0]["mean_return"] != rows[1]["mean_return"]
    for name in ("mean_return", "random_return", "env_steps"):
        assert summary[name] == pytest.approx((rows[0][name] + rows[1][name]) / 2)
    # PPO stops exactly, evolution after the generation that spends the budget.
    assert rows[0]["env_steps"] == 64 if algorithm == "ppo" else rows[0]["env_steps"] > 64 and rows[0]["generations"] == 1
    for seed in (3, 4):
        folder = tmp_path / f"seed-{seed}"
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert lines[-1]["env_steps"] == rows[seed - 3]["env_steps"] and (folder / "checkpoint").is_dir()


def test_paper_preset_gives_defaults_that_options_override():
    config = parse(["--env", "CartPole-v1", "--preset", "paper", "--rank", "2"])
    assert (config.population_size, config.optimizer, config.rank, config.hidden_sizes) == (2048, "sgd", 2, (256,) * 3)
    assert config.shaping == "z_score" and config.sampled_actions
    assert parse(["--env", "brax/ant@spring", "--preset", "paper"]).learning_rate == 0.01
    assert len(PAPER) == 16


def test_every_preset_makes_a_configuration_that_checks():
    for env in PAPER:
        parse(["--env", env, "--preset", "paper"]).check()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_cartpole_is_solved(seed, capsys, tmp_path):
    summary = run(capsys, "--seed", str(seed), "--folder", str(tmp_path))
    assert summary["mean_return"] >= 475 and summary["seconds"] < 60


BAD = {  # options: what the run says of them
    "--env Pendulum-v1 --sigma 1e-5": r"updates moved the weights by more than 10 sigma .*Raise sigma \(now 1e-05\)",
    "--env Pendulum-v1 --sigma 5": r"above that of random actions, -\d+\. Sigma \(5\) is \d.* it drowns\. Lower sigma",
    "--env navix/Navix-Empty-8x8-v0": "both members of every pair had the same fitness .*sample actions",
}


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("options", list(BAD))
def test_a_bad_setting_is_named_by_the_run(options, tmp_path, capsys, recwarn):
    if "navix" in options:
        pytest.importorskip("navix")
    rl.main([*options.split(), "--env-steps", "300000", "--folder", str(tmp_path)])
    said = capsys.readouterr().out + "".join(str(warning.message) for warning in recwarn)
    assert re.search(BAD[options], said)


def test_what_a_journal_carries_is_as_large_as_the_page_says():
    """docs/method.md: 8 bytes a feature + 52."""
    checks = SimpleNamespace(done=0, met=False, best_env_steps=0, best=0.0)
    for features in (4, 30):
        task = SimpleNamespace(environment=SimpleNamespace(observation_shape=(features,)))
        carried = evolution._Progress(task, checks, look=dict, most_steps=1).save()
        assert len(pack(carried)) == 8 * features + 52
