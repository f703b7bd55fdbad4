"""Who may import whom, how long a file and how full a folder may be."""

import ast
import re
import subprocess
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BASE = ["version", "checkout", "digests", "signatures", "files"]
ARRAYS = [*BASE, "programs", "kernels", "noise", "lazy", "state", "population", "protocol", "update", "devices"]
STRATEGY = ["plans", "generation", "scan", "settings", "strategy"]
RUNS = ["journal", "runs", "launch"]  # these know strategies by `eggroll.protocol` only
LAYERS = [*ARRAYS, *STRATEGY, *RUNS, "eggroll", "llm", "zo", "experiments"]  # each imports from those before it
ONLY = {"envs": {*BASE}, "kernels": {"checkout"}}  # these know arrays, not populations
ALLOWED = {room: ONLY.get(room, {*LAYERS[:index]}) for index, room in enumerate(LAYERS)} | ONLY
ALLOWED["experiments"] = {*LAYERS, "envs"}
for runs in RUNS:
    ALLOWED[runs] -= {"strategy"}
MAX_LINES, MAX_KERNEL_LINES = 300, 450
MAX_FILES, MAX_TEST_FILES = 20, 25


def module_of(path: Path) -> str:
    """Dotted name; the top-level folders are packages of `eggroll`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "eggroll" else ("eggroll", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TRACKED = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
FILES = {module_of(ROOT / path): ROOT / path for path in TRACKED if not path.startswith("tests/") and (ROOT / path).exists()}


def imports(source: str) -> Iterator[str]:
    """Dotted names of everything a module imports, inside functions and for type checkers too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_imported(name: str) -> str | None:
    """The module of this project that an imported name is, or comes from."""
    parent = name.rpartition(".")[0]
    return name if name in FILES else parent if parent in FILES else None


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


GRAPH = {
    module: {target for name in imports(path.read_text()) if (target := module_imported(name)) is not None}
    for module, path in FILES.items()
}


def test_imports_follow_the_layers():
    pairs = {(module, target) for module in GRAPH for target in GRAPH[module]}
    assert ("eggroll.generation", "eggroll.devices.sharded") in pairs
    wrong = {(a, b) for a, b in pairs if room(a) != room(b) and room(b) not in ALLOWED[room(a)]}
    assert not wrong
    tests = {name for path in FILES.values() for name in imports(path.read_text()) if name.split(".")[0] == "tests"}
    assert not tests
    quax = {module for module, path in FILES.items() if "quax" in {name.split(".")[0] for name in imports(path.read_text())}}
    assert quax == {"eggroll.lazy.perturbed"}


def test_no_imports_in_a_circle():
    try:
        tuple(TopologicalSorter(GRAPH).static_order())
    except CycleError as error:
        pytest.fail(f"imports in a circle: {' -> '.join(error.args[1])}")


def test_files_and_folders_are_of_readable_size():
    folders: dict[str, int] = {}
    for path in map(Path, TRACKED):
        folders[str(path.parent)] = folders.get(str(path.parent), 0) + 1
        limit = MAX_KERNEL_LINES if path.parts[0] == "kernels" else MAX_LINES
        if path.parts[0] != "tests" and (ROOT / path).exists():
            assert path.name != "utils.py" and len((ROOT / path).read_text().splitlines()) <= limit, path
    full = {folder: n for folder, n in folders.items() if n > (MAX_TEST_FILES if folder.startswith("tests") else MAX_FILES)}
    assert not full


def test_checker_sees_imports_of_every_form():
    source = "import a.b\nfrom c import d\ndef f():\n    from e.g import h\n"
    assert [*imports(source)] == ["a.b", "c.d", "e.g.h"]


def test_the_night_runs_every_folder_of_tests():
    (named,) = re.findall(r"^for folder in ([a-z ]+);", (ROOT / ".ci/night").read_text(), flags=re.MULTILINE)
    folders = {path.split("/")[1] for path in TRACKED if re.fullmatch(r"tests/[a-z]+/.*test_\w+\.py", path)}
    assert set(named.split()) == folders
