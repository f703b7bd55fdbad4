"""Options that cannot take effect are errors: what every command says, what suites pass on, and that no option is forgotten."""

import dataclasses
import itertools

import pytest

from eggroll import envs
from eggroll.experiments.bench import decode, egg, engine, floor, gpu_report, kernels, populations, rl, scale, zo
from eggroll.experiments.bench.memory import options as memory
from eggroll.experiments.common.options import covers, drop_options, option_values
from eggroll.experiments.egg import baseline_suite
from eggroll.experiments.egg import config as egg_config
from eggroll.experiments.egg import suite as egg_suite
from eggroll.experiments.estimator import __main__ as estimator
from eggroll.experiments.faultdrill import __main__ as faultdrill
from eggroll.experiments.reason import config as reason_config
from eggroll.experiments.reason import suite as reason_suite
from eggroll.experiments.reason.effects import RULES as REASON_RULES
from eggroll.experiments.rl import __main__ as rl_main
from eggroll.experiments.rl import choosing as rl_choosing
from eggroll.experiments.rl import config as rl_config
from eggroll.experiments.rl import inputs as rl_inputs
from eggroll.experiments.rl import suite as rl_suite
from eggroll.experiments.zo import config as zo_config
from eggroll.experiments.zo import suite as zo_suite
from eggroll.journal import __main__ as journal

PARSERS = {"rl": rl_config.parse, "zo": zo_config.parse, "egg": egg_config.parse, "reason": reason_config.parse}
OF_A_RUN = "seed seeds folder"
_EGG = "data cache layers width rounding population_size group bytes_per_update alpha alpha_end shift rank distribution shaping"
# Command -> its options, its rules, and the options that always take effect; the rest has to be in a rule.
COMMANDS = {
    "rl": (rl_config.Config, rl_config.RULES, f"env imports algorithm max_steps evaluation_episodes {OF_A_RUN}"),
    "zo": (
        zo_config.Config,
        zo_config.RULES,
        "recipe model data template label_words answer max_length objective steps batch_size learning_rate checks evaluate "
        + OF_A_RUN,
    ),
    "egg": (
        egg_config.Config,
        egg_config.RULES,
        f"preset {_EGG} generations chunk_size mesh validation_every validation_bytes sample_length checkpoint_every resume "
        + OF_A_RUN,
    ),
    "egg_baselines": (
        baseline_suite.Config,
        baseline_suite.RULES,
        "baselines data cache layers width streams bytes_per_update updates learning_rates validation_every validation_bytes "
        + OF_A_RUN,
    ),
    "reason": (
        reason_config.Config,
        REASON_RULES,
        "preset algorithm model weights data reward template prompt_length max_new_tokens stop stop_token_ids clock "
        f"temperature generations seconds workers reward_minimum check_every validation_size test_size examples {OF_A_RUN}",
    ),
    "rl_suite": (rl_suite.Config, (), "envs algorithms seeds budget search jobs folder"),  # its check of search is its own
    "rl_choosing": (rl_choosing.Config, (), "knobs seeds jobs page folder"),
    "zo_suite": (zo_suite.Config, zo_suite.OF_SUITE, "model recipes seeds forwards search folder"),
    "egg_scaling": (
        egg_suite.Config,
        (),
        "populations streams bytes_per_update generations layers width seeds baselines folder",
    ),
    "reason.compare": (
        reason_suite.Config,
        reason_suite.COMPARED,
        "presets algorithms seconds generations seeds cores folder figure",
    ),
    "estimator": (
        estimator.Config,
        (),
        "ranks bias_size bias_pairs bias_replicates sigmas sizes cosine_pairs cosine_replicates population_sizes width "
        "error_replicates rank seed run",
    ),
    "faultdrill": (
        faultdrill.Config,
        (),
        "kills job_kills generations checkpoint_every storage pairs workers rivals launches seed folder",
    ),
    "bench engine": (engine.Engine, (), "cases repeats dense_repeats distribution rank tune"),
    "bench floor": (floor.Floor, (), "cases repeats distribution rank"),
    "bench decode": (
        decode.Decode,
        decode.RULES,
        "prompts max_new_tokens rank repeats model",
    ),
    "bench kernels": (kernels.Kernels, kernels.RULES, "ops cases small repeats verbose"),
    "bench rl": (
        rl.RL,
        (),
        "env target seeds generations population_size episodes sigma learning_rate hidden_sizes",
    ),
    "bench scale": (scale.Scale, (), "devices members width examples chunk_size growths"),
    "bench populations": (populations.Populations, (), "memory_budget case"),
    "bench zo": (zo.ZO, (), "blocks width tokens directions matrix rows repeats models"),
    "bench egg": (
        egg.EGG,
        egg.RULES,
        "repeats "
        + " ".join(f"train.{name}" for name in [*_EGG.split(), "alpha_steps", "update", "chunk_size", "mesh", "seed"]),
    ),
    "bench memory": (memory.Memory, memory.RULES, "target members"),
    "bench gpu": (gpu_report.GPU, (), "report folder parts minutes"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_in_a_rule_or_always_takes_effect(command):
    """A new option has to be classified: where does it have no effect?"""
    config, rules, always = COMMANDS[command]
    options = set(option_values(config()))
    in_rules = {option for option in options if any(covers(rule, option) for rule in rules)}
    assert options - in_rules == set(always.split()) and not in_rules & set(always.split())
    unknown = {name for rule in rules for name in rule.options if not any(covers(rule, option) for option in options)}
    assert not unknown


PPO, RANDOM, GRPO, ADAM = (
    ["--algorithm", "ppo"],
    ["--algorithm", "random"],
    ["--algorithm", "grpo"],
    ["--recipe", "adam"],
)
MODEL = ["--model", "folder"]
REFUSED = [
    ("rl", [*PPO, "--sigma", "0.2"], "--sigma has no effect with --algorithm ppo: it belongs to eggroll and openes."),
    ("rl", [*PPO, "--mesh", "population=2"], "--mesh has no effect with --algorithm ppo: it belongs to eggroll and openes."),
    ("rl", [*PPO, "--generations", "3"], "--generations has no effect with --algorithm ppo"),
    ("rl", ["--algorithm", "openes", "--rank", "2"], "--rank has no effect with --algorithm openes: it belongs to eggroll."),
    ("rl", ["--ppo.clip", "0.1"], "--ppo.clip has no effect with --algorithm eggroll: it belongs to ppo."),
    ("rl", [*RANDOM, "--render"], "--render has no effect with --algorithm random: it belongs to eggroll, openes and ppo."),
    ("rl", [*RANDOM, "--resume"], "--resume has no effect with --algorithm random: it belongs to eggroll and openes."),
    (
        "rl",
        ["--sigma-schedule", "linear", "--sigma-decay", "0.9"],
        "--sigma-decay has no effect with --sigma-schedule linear: it belongs to exponential.",
    ),
    (
        "rl",
        ["--learning-rate-end", "0.5"],
        "--learning-rate-end has no effect with --learning-rate-schedule exponential: it belongs to linear and cosine.",
    ),
    ("rl", [*RANDOM, "--preset", "paper"], "--preset has no effect with --algorithm random"),
    (
        "rl",
        [*PPO, "--ppo.epochs", "1", "--ppo.minibatches", "1", "--ppo.clip", "0.1"],
        "--ppo.clip has no effect with --ppo.epochs 1 and --ppo.minibatches 1: the probability ratio is 1",
    ),
    (
        "zo",
        [*ADAM, "--chunk-directions", "2"],
        "--chunk-directions has no effect with --recipe adam: it belongs to mezo, adamezo",
    ),
    ("zo", [*ADAM, "--checkpoint-every", "7"], "--checkpoint-every has no effect with --recipe adam"),
    ("zo", ["--dtype", "bfloat16"], "--dtype has no effect without --model: the small model has float32 parameters."),
    ("zo", [*MODEL, "--start.layers", "1"], "--start.layers has no effect with --model: it is of the small model."),
    ("zo", ["--steps", "3", "--forwards", "8"], "--forwards has no effect with --steps, which says how long training takes"),
    ("zo", ["--answer", "{a}", "--task", "rte"], "--task has no effect with --label-words or --answer, which make a task"),
    ("zo", ["--start.steps", "0", "--start.length", "8"], "--start.length has no effect with --start.steps 0"),
    (
        "egg",
        ["--sample-length", "0", "--temperature", "1"],
        "--temperature has no effect with --sample-length 0: no text is drawn",
    ),
    ("egg", ["--alpha-end", "1", "--alpha-steps", "9"], "--alpha-steps has no effect with --alpha-end equal to --alpha"),
    ("egg", ["--distribution", "rademacher", "--update", "sign"], "--update has no effect with --distribution rademacher"),
    ("reason", [*GRPO, "--sigma", "0.5"], "--sigma has no effect with --algorithm grpo: it belongs to eggroll."),
    ("reason", [*GRPO, "--prompts", "4"], "--prompts has no effect with --algorithm grpo: it belongs to eggroll."),
    ("reason", [*GRPO, "--plan"], "--plan has no effect with --algorithm grpo: it belongs to eggroll."),
    ("reason", ["--grpo.samples", "4"], "--grpo.samples has no effect with --algorithm eggroll: it belongs to grpo."),
    ("reason", [*GRPO, "--grpo.clip", "0.1"], "--grpo.clip has no effect with --grpo.epochs 1 and --grpo.minibatches 1"),
    ("reason", ["--int8.sigma", "1"], "--int8.sigma has no effect with --weights float: it belongs to int8."),
    (
        "reason",
        ["--weights", "int8", "--int8.threshold", "1", "--int8.learning-rate", "1"],
        "--int8.learning-rate has no effect with --int8.threshold, which takes its place.",
    ),
    ("reason", ["--dtype", "bfloat16"], "--dtype has no effect without --model: the small model has float32 parameters."),
    ("reason", [*MODEL, "--start.steps", "1"], "--start.steps has no effect with --model: it is of the small model."),
    ("reason", ["--task", "gsm8k", "--start.noise", "0.1"], "--start.noise has no effect without --task arithmetic"),
    (
        "reason",
        ["--task-options", "noise=0.1", "--start.noise", "0.1"],
        "--start.noise has no effect without --task arithmetic, or",
    ),
    ("reason", [*MODEL, "--task-options", "noise=0.1"], "--task-options noise has no effect with --model"),
    ("reason", [*MODEL, "--precision", "nearest"], "--precision has no effect on float32 parameters"),
    ("reason", ["--top-p", "0.5"], "--top-p has no effect on greedy completions; give a --temperature."),
    ("reason", ["--timeout", "1"], "--timeout has no effect with --workers 0: nothing stops a reward in this process."),
    ("reason", ["--chunk-size", "2", "--memory-budget", "9"], "--memory-budget has no effect with --chunk-size, which takes"),
    ("reason", ["--plan", "--mesh", "population=2"], "--mesh has no effect with --plan, which is of one device."),
]


@pytest.mark.parametrize(("command", "options", "message"), REFUSED, ids=[f"{row[0]} {' '.join(row[1])}" for row in REFUSED])
def test_an_option_without_effect_is_a_clear_error(command, options, message):
    with pytest.raises(ValueError) as raised:
        PARSERS[command](options).check()
    assert str(raised.value).startswith(message) and str(raised.value).endswith(".")


ACCEPTED = [
    ("rl", [*PPO, "--env", "Pendulum-v1", "--ppo.clip", "0.1"]),  # whose defaults of sigma and the population are others
    ("rl", [*PPO, "--preset", "paper"]),
    ("rl", ["--algorithm", "openes", "--preset", "paper"]),  # which sets a rank
    ("rl", ["--env", "brax/ant", "--preset", "paper", "--learning-rate-schedule", "cosine"]),  # which sets a decay
    ("rl", [*RANDOM, "--max-steps", "10"]),
    ("rl", ["--resume", "--render", "--chunk-size", "512"]),
    ("zo", [*ADAM, "--steps", "3"]),
    ("zo", ["--recipe", "lozo", "--offload", "--weight-decay", "0.1"]),
    ("egg", ["--preset", "paper", "--resume"]),
    ("reason", ["--preset", "smollm2-sums", *GRPO]),
    ("reason", [*GRPO, "--grpo.epochs", "2", "--grpo.clip", "0.1", "--temperature", "0.7"]),
    ("reason", ["--plan", "--memory-budget", "9", "--rank", "2", "--seconds", "60", "--start.layers", "1"]),
    ("reason", ["--weights", "int8", "--precision", "stochastic", "--int8.threshold", "1"]),
    ("reason", ["--workers", "2", "--timeout", "1", "--temperature", "1", "--top-p", "0.9", "--samples", "2"]),
]


@pytest.mark.parametrize(("command", "options"), ACCEPTED, ids=[f"{command} {' '.join(o)}" for command, o in ACCEPTED])
def test_options_that_take_effect_are_accepted(command, options):
    PARSERS[command](options).check()


@pytest.mark.parametrize(
    ("run", "config", "message"),
    [
        (
            decode.run,
            decode.Decode(model="folder", layers=1),
            "--layers has no effect with --model: it is of the random models",
        ),
        (egg.run, egg.EGG(egg_config.Config(preset="paper")), "--train.preset has no effect in the benchmark"),
        (egg.run, egg.EGG(egg_config.Config(resume=True)), "--train.resume has no effect in the benchmark"),
        (kernels.run, kernels.Kernels(("int8_dot",), tokens=2), "--tokens has no effect without generation among --ops"),
        (kernels.run, kernels.Kernels(members=64, small=True), "members must be at most 8 where cases are shrunk"),
        (kernels.run, kernels.Kernels(("int8_dot",), ("huge",)), "cases must be parts of .*, got huge"),
    ],
)
def test_benchmarks_refuse_them_too(run, config, message):
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        run(config)


@pytest.mark.parametrize(("command", "option"), [*itertools.product(("inspect", "verify"), ("generation", "out"))])
def test_the_journal_refuses_options_of_replay(command, option):
    with pytest.raises(SystemExit, match=f"^error: --{option} has no effect with {command}: it belongs to replay."):
        journal.main([command, "run", f"--{option}", "3"])


def test_the_environment_decides_about_pictures_and_sampled_actions():
    undrawn = dataclasses.replace(envs.make("CartPole-v1"), draw=None)
    assert "it cannot be drawn" in rl_inputs.ignored_in(undrawn, rl_config.Config(render=True))["render"]
    assert not rl_inputs.ignored_in(envs.make("CartPole-v1"), rl_config.Config(render=True))
    sampled = rl_config.Config(env="Pendulum-v1", algorithm="ppo", sampled_actions=True)
    with pytest.raises(ValueError, match="--sampled-actions has no effect with --algorithm ppo and --env Pendulum-v1"):
        rl_main.run(sampled)
    for config in (dataclasses.replace(sampled, algorithm="eggroll"), dataclasses.replace(sampled, env="CartPole-v1")):
        rl_inputs.load(config)


def test_a_run_of_a_preset_is_loaded_without_it():
    """The preset gave sampled actions, which PPO ignores here; options that were stored do not say so."""
    config = rl_config.parse(["--env", "Pendulum-v1", "--algorithm", "ppo", "--preset", "paper"])
    assert not rl_inputs.ignored_in(envs.make("Pendulum-v1"), config)
    assert not rl_inputs.load(rl_config.restore_config(config.options())).sampled


def test_options_are_dropped_with_their_values():
    line = [
        "--sigma",
        "-1",
        "--no-ppo.linear-decay",
        "--ppo.no-linear-decay",
        "--hidden-sizes",
        "8",
        "8",
        "--noise-reuse=2",
        "--a",
    ]
    assert drop_options(line, {"sigma", "hidden_sizes"}) == tuple(line[2:4] + line[7:])
    assert drop_options(line, {"ppo.linear_decay", "noise_reuse"}) == tuple(line[:3] + line[4:7] + line[8:])


def test_suites_pass_options_to_the_runs_that_they_belong_to(tmp_path):
    options = ["--sigma", "0.3", "--ppo.clip", "0.1", "--rank", "2", "--sampled-actions", "--max-steps", "9"]
    rows = {
        name: rl_suite.make_setting(tmp_path, "Pendulum-v1", name, options) for name in ("eggroll", "openes", "ppo", "random")
    }
    passed = {name: {part for part in row.arguments if part.startswith("--")} for name, row in rows.items()}
    assert passed["eggroll"] - passed["openes"] == {"--rank"} and "--resume" in passed["openes"]
    assert passed["openes"] == {"--env", "--algorithm", "--sigma", "--sampled-actions", "--max-steps", "--resume"}
    assert passed["ppo"] == {"--env", "--algorithm", "--ppo.clip", "--max-steps"}
    assert passed["random"] == {"--env", "--algorithm", "--max-steps"}
    assert "sigma" in rows["eggroll"].options and "sigma" not in rows["ppo"].options  # not compared with earlier runs
    config = zo_suite.Config(folder=tmp_path)
    recipe, adam = (zo_suite.make_setting(config, "small", name, ["--directions", "2"]) for name in ("mezo", "adam"))
    assert "--directions" in recipe.arguments and "--directions" not in adam.arguments
    config = reason_suite.Config(folder=tmp_path / "reason")
    ours, grpo = (reason_suite.make_setting(config, "rwkv7", name, ["--prompts", "4"]) for name in ("eggroll", "grpo"))
    assert "--prompts" in ours.arguments and "--prompts" not in grpo.arguments
    config = reason_suite.Config(folder=tmp_path / "presets", presets=("smollm2-sums",))
    ours, int8, grpo = (reason_suite.make_setting(config, "smollm2-sums", name, []) for name in reason_suite.ALGORITHMS)
    assert ours.options["template"] == int8.options["template"] == grpo.options["template"] != "{prompt}"
    assert int8.options["weights"] == "int8" and ours.options["weights"] == "float" and "sigma" not in grpo.options


@pytest.mark.parametrize("suite", [rl_suite, zo_suite, egg_suite])
def test_suites_that_resume_their_runs_accept_a_change(suite, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = {"envs": ("CartPole-v1",)} if suite is rl_suite else {}
    options = ["--start.steps", "0"] if suite is zo_suite else []
    made = suite.make_suite(suite.Config(folder=tmp_path / "suite", **more), [*options, "--accept-change"])
    resumed = [job.setting.arguments for job in made.jobs if "--resume" in job.setting.arguments]
    assert resumed and all("--accept-change" in arguments for arguments in resumed)


@pytest.mark.parametrize(
    ("suite", "options", "message"),
    [
        (reason_suite, ["--accept-change"], "--accept-change has no effect without --resume"),
        (rl_suite, ["--algorithms", "ppo", "--accept-change"], "--accept-change has no effect with --algorithm ppo"),
        (rl_suite, ["--algorithms", "eggroll", "--ppo.clip", "0.1"], "--ppo.clip has no effect with --algorithm eggroll"),
        (rl_suite, ["--algorithms", "ppo", "--search", "2"], "--search has no effect with --algorithms ppo"),
        (rl_suite, ["--seed", "3"], "--seed cannot be given to a suite, which sets it for every run."),
        (rl_suite, ["--env", "Acrobot-v1"], "--env cannot be given to a suite"),
        (zo_suite, ["--recipes", "adam", "--sigma", "1"], "--sigma has no effect with --recipe adam"),
        (zo_suite, ["--steps", "3"], "--steps cannot be given to a suite"),
        (zo_suite, ["--probe"], "--probe cannot be given to a suite"),
        (zo_suite, ["--evaluate"], "--evaluate cannot be given to a suite"),
        (zo_suite, ["--guidance"], "--guidance cannot be given to a suite"),
        (zo_suite, ["--resume"], "--resume cannot be given to a suite"),
        (rl_suite, ["--no-resume"], "--resume cannot be given to a suite"),
        (egg_suite, ["--resume"], "--resume cannot be given to a suite"),
        (reason_suite, ["--probe"], "--probe cannot be given to a suite"),
        (reason_suite, ["--plan"], "--plan cannot be given to a suite"),
        (zo_suite, ["--studies", "sums"], "--studies has no effect without --model"),
        (zo_suite, ["--model", "x", "--objective", "accuracy"], "--objective cannot be given to a suite"),
        (egg_suite, ["--population-size", "64"], "--population-size cannot be given to a suite"),
        (reason_suite, ["--algorithms", "grpo", "--sigma", "1"], "--sigma has no effect with --algorithm grpo"),
        (reason_suite, ["--presets", "small", "--architectures", "rwkv7"], "--architectures has no effect with --presets"),
        (
            reason_suite,
            ["--presets", "tiny"],
            "presets must be out of small, smollm2-sums, smollm2-chain, smollm2-countdown, got tiny",
        ),
        (reason_suite, ["--start.architecture", "rwkv7"], "--start.architecture cannot be given to a suite"),
    ],
)
def test_suites_refuse_options_that_no_run_reads(suite, options, message, tmp_path):
    environment = ["--envs", "CartPole-v1"] if suite is rl_suite else []
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        suite.main([*environment, *options, "--folder", str(tmp_path)])
