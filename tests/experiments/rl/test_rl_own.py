"""The user's own environment and network on the command line: imports, networks that fit and that do not."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eggroll import envs
from eggroll.envs import registry
from eggroll.experiments.rl import __main__ as rl
from eggroll.experiments.rl import imports
from eggroll.experiments.rl.config import Config, parse
from eggroll.experiments.rl.inputs import load, make_critic
from eggroll.experiments.rl.networks import CNN, GRU, MLP, patches
from tests.tables import slow

pytestmark = pytest.mark.usefixtures("standard_promotion")
SOURCE = """
import flax.linen as nn
import jax.numpy as jnp
from eggroll import envs


def make(name, shape, reward=lambda: jnp.float32(1)):
    def reset(key):
        return jnp.ones(shape), jnp.int32(0)

    def step(key, state, action):
        return envs.Transition(jnp.ones(shape), state + 1, reward(), state >= 3, jnp.bool_(False))

    space = envs.Discrete(3)
    return envs.Environment(name, reset=reset, step=step, observation_shape=shape, action_space=space, max_steps=9)


for NAME, SHAPE in (("mine/flat", (4,)), ("mine/image", (6, 5, 2))):
    envs.register(NAME, lambda name=NAME, shape=SHAPE: make(name, shape))
envs.register("mine/wrong", lambda: make("mine/wrong", (4,), reward=lambda: jnp.ones(2)))
envs.register("mine/none", lambda: None)
envs.register("mine/nan", lambda: make("mine/nan", (4,), reward=lambda: jnp.float32(jnp.nan)))


class Linear(nn.Module):
    outputs: int

    @nn.compact
    def __call__(self, x):
        assert x.ndim == 1, "a vector is expected"
        return nn.Dense(self.outputs)(x)


class Short(Linear):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(x)


class Counter(Linear):
    def initial_memory(self):
        return jnp.int32(0)

    @nn.compact
    def __call__(self, memory, x):
        return memory + 1, nn.Dense(self.outputs)(x) * memory


class Forgets(Counter):
    @nn.compact
    def __call__(self, memory, x):
        return x, nn.Dense(self.outputs)(x)


class Empty(Linear):
    def initial_memory(self):
        return None

    @nn.compact
    def __call__(self, memory, x):
        return memory + 1, nn.Dense(self.outputs)(x)


class Lost(Counter):
    def initial_memory(self):
        return {}["size"]


class Broken(Linear):
    def __post_init__(self):
        raise KeyError("sizes")


class NoModule:
    def __init__(self, outputs):
        pass
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.setattr(sys, "path", [*sys.path])
    imports._import_file.cache_clear()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("import json\n\nx = 1 / 0\n")
    (tmp_path / "unfinished.py").write_text("def f(:\n")
    (tmp_path / "asks.py").write_text("import not_installed_at_all\n")
    (tmp_path / "reads.py").write_text("levels = open('levels.json')\n")
    (tmp_path / "json.py").write_text("")
    yield tmp_path
    sys.modules.pop("mine", None)


def task(*arguments):
    config = parse(["--import", "mine.py", *arguments])
    config.check()
    return load(config)


def test_an_environment_and_networks_of_a_file(folder):
    assert isinstance(task("--env", "mine/flat").network, MLP)
    assert isinstance(task("--env", "mine/image").network, CNN)
    assert isinstance(task("--env", "mine/image", "--network", "mlp").network, MLP)
    assert isinstance(task("--env", "mine/image", "--network", "gru").network, GRU)
    for name in ("mine.py:Linear", "mine:Linear"):  # the file joined the path
        assert type(task("--env", "mine/flat", "--network", name).network).__name__ == "Linear"
    image = task("--env", "mine/image", "--algorithm", "ppo")
    assert isinstance(make_critic(Config(), image), CNN)


@pytest.mark.filterwarnings("ignore:generation . was skipped:UserWarning")
def test_steps_of_members_without_a_fitness_count(folder, capsys):
    """Otherwise a run in which no member ever has one would not end."""
    small = ["--population-size", "4", "--hidden-sizes", "4", "--env-steps", "40", "--evaluation-episodes", "2"]
    rl.main(["--import", "mine.py", "--env", "mine/nan", *small, "--checks", "1", "--folder", str(folder / "run")])
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["ended"], summary["env_steps"], summary["invalid"]) == ("env_steps", 40, 40)  # they end in the first step


@pytest.mark.parametrize("network", [slow("gru"), "mine.py:Counter"])
def test_policies_with_a_memory(network, folder):
    played = task("--env", "mine/flat", "--network", network)
    params, statistics = played.init_params(key=jax.random.key(0)), envs.initial_statistics((4,))
    assert played.play(params, statistics, jax.random.key(1), episodes=2).total_reward.tolist() == [4, 4]


def test_the_recipe_of_a_journal_imports_what_the_run_did(folder):
    options = parse(["--import", "mine.py", "--env", "mine/flat", "--network", "mine.py:Counter"]).options()
    es, state = rl.remake(json.loads(json.dumps(options)) | {"seed": 3})
    assert es.population_size == 256 and state.params["params"]["Dense_0"]["kernel"].shape == (4, 3)
    older = parse(["--env", "mine/image"]).options()
    del older["network"], older["imports"]  # of a journal from before these options, when every network was dense
    assert rl.remake(json.loads(json.dumps(older)) | {"seed": 3})[1].params["params"]["Dense_0"]["kernel"].shape == (60, 32)


IMPORTS = [
    ("absent.py", "--import: there is no file absent.py."),
    ("absent_module", "--import: there is no module 'absent_module'; name a file, such as my_env.py, or a module that Python"),
    ("broken.py", "--import: broken.py, line 3 raised ZeroDivisionError: division by zero"),
    ("unfinished.py", "--import: unfinished.py, line 1 raised SyntaxError: invalid syntax"),
    ("asks.py", "--import: asks.py, line 1 raised ModuleNotFoundError: No module named 'not_installed_at_all'"),
    ("reads.py", "--import: reads.py, line 1 raised FileNotFoundError: [Errno 2] No such file or directory: 'levels.json'"),
    ("json.py", "--import: json.py raised ImportError: a module 'json' is imported already; give the file another name"),
]


@pytest.mark.parametrize(("source", "words"), IMPORTS)
def test_what_cannot_be_imported(source, words, folder):
    with pytest.raises(SystemExit) as ended:
        rl.main(["--import", source])
    assert str(ended.value).startswith(f"error: {words}")


FLAT, IMAGE = ("--env", "mine/flat", "--network"), ("--env", "mine/image", "--network")
NETWORKS = [
    ((*FLAT, "transformer"), "network must be one of mlp, cnn, gru, or module:Class or file.py:Class, got 'transformer'."),
    ((*FLAT, "cnn"), "--network cnn needs images [height, width, channels], env 'mine/flat' has observations (4,)."),
    ((*FLAT, "gru", "--hidden-sizes"), "hidden_sizes must not be empty with --network gru"),
    ((*FLAT, "gru", "--algorithm", "ppo"), "--network gru has a memory, which --algorithm ppo does not train; use eggroll or"),
    (
        (*FLAT, "mine.py:Missing"),
        "--network: mine.py has no class 'Missing'; it has Linear, Short, Counter, Forgets, Em",
    ),
    ((*FLAT, "absent:Linear"), "--network: there is no module 'absent';"),
    ((*FLAT, "flax.linen:Dense"), "--network flax.linen:Dense is made as Dense(outputs=3), which raised TypeError: "),
    (
        (*FLAT, "mine.py:Broken"),
        "--network mine.py:Broken is made as Broken(outputs=3), which raised KeyError: 'sizes' (mine.py",
    ),
    ((*FLAT, "mine.py:Lost"), "network mine.py:Lost in env 'mine/flat': initial_memory raised KeyError: 'size' (mine.py"),
    ((*FLAT, "mine.py:Empty"), "network mine.py:Empty in env 'mine/flat': initial_memory() must return arrays; a network"),
    ((*FLAT, "mine.py:NoModule"), "network mine.py:NoModule must be a flax.linen.Module, got NoModule."),
    (
        (*FLAT, "mine.py:Short"),
        "network mine.py:Short in env 'mine/flat' must return float32[3] for one observation, got",
    ),
    (
        (*FLAT, "mine.py:Forgets"),
        "network mine.py:Forgets in env 'mine/flat': policy must return its memory as it came: it is int32[], got float32[4].",
    ),
    (
        (*IMAGE, "mine.py:Linear"),
        "network mine.py:Linear in env 'mine/image' cannot read observations float32[6, 5, 2]: AssertionError: a vector is",
    ),
    ((*FLAT, "mine.py:Linear", "--activation", "relu_layer_norm"), "--activation has no effect with a --network of your own."),
    (("--env", "mine/wrong"), "env 'mine/wrong': reward must be a float32 scalar, got float32[2]."),
    (("--env", "mine/none"), "the factory of 'mine/none' must return an envs.Environment, got NoneType."),
    (("--env", "mine/flta"), "env must name an environment, got 'mine/flta'; did you mean mine/flat"),
]


@pytest.mark.parametrize(("arguments", "words"), NETWORKS)
def test_what_does_not_fit(arguments, words, folder):
    with pytest.raises(SystemExit) as ended:
        rl.main(["--import", "mine.py", *arguments])
    assert str(ended.value).startswith(f"error: {words}")


def test_patches_are_what_a_convolution_reads():
    image = jax.random.normal(jax.random.key(0), (7, 6, 2))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 2, 4))
    for stride in (1, 2):
        expected = jax.lax.conv_general_dilated(
            image[None], kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        ours = patches(image, stride=stride) @ kernel.reshape(-1, 4)
        np.testing.assert_allclose(ours, expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("side", "seen"), [(10, 10), (20, 10), (63, 8)])
def test_convolutions_of_small_and_large_images(side, seen):
    shapes = jax.eval_shape(CNN((8,), 3).init, jax.random.key(0), jnp.zeros((side, side, 4)))["params"]
    assert shapes["MLP_0"]["Dense_0"]["kernel"].shape == (seen * seen * 16, 8)
    assert len(shapes) == {10: 2, 20: 2, 63: 4}[side]
