"""In a checkout, the top-level folders are packages of `eggroll`, under one module object each, and commands run."""

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("zo", "kernels", "envs", "experiments")
MODULES = (*FOLDERS, "zo.recipes", "zo.offload.runner", "kernels.lowrank_dot.api", "envs.tasks", "experiments.rl.config")
COMMANDS = ["rl", "rl_suite", "zo", "zo_suite", "egg", "egg_baselines", "egg_scaling", "reason", "reason.compare"]
COMMANDS += ["bench", "estimator", "faultdrill", "uses"]
ALIAS_FIRST = """
import sys
import zo.recipes, experiments.bench.timing
import eggroll.zo.recipes, eggroll.experiments.bench.timing
for name in ("zo", "zo.recipes", "experiments", "experiments.bench", "experiments.bench.timing"):
    assert sys.modules[name] is sys.modules["eggroll." + name], name
    assert sys.modules[name].__name__ == sys.modules[name].__spec__.name == "eggroll." + name
assert zo.mezo is eggroll.zo.recipes.mezo
"""


@pytest.mark.parametrize("name", MODULES)
def test_folder_is_the_package_of_eggroll(name):
    assert importlib.import_module(f"eggroll.{name}") is importlib.import_module(name)


def test_links_are_committed_as_links():
    command = ["git", "ls-files", "--stage", "--", *(f"eggroll/{name}" for name in FOLDERS)]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    modes = {line.split("\t")[1]: line.split()[0] for line in listing.splitlines()}
    assert modes == {f"eggroll/{name}": "120000" for name in FOLDERS}
    assert {os.readlink(ROOT / "eggroll" / name) for name in FOLDERS} == {f"../{name}" for name in FOLDERS}


@pytest.mark.parametrize("prefix", ["", "eggroll."])
@pytest.mark.parametrize("command", COMMANDS)
def test_command_has_code_to_run(command, prefix):
    name = f"{prefix}experiments.{command}"
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(f"{name}.__main__")
    assert spec is not None and spec.loader is not None
    assert spec.loader.get_code(spec.name) is not None  # what `python -m` asks a loader for


def test_top_level_names_come_first_and_run_as_commands():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", ALIAS_FIRST], cwd=ROOT, env=environment, check=True)
    command = [sys.executable, "-m", "experiments.egg_scaling", "--help"]
    assert "usage" in subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout
