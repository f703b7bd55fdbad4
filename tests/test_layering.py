"""Who may import whom, and how long a file may be."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "kernels": {"kernels"},
    "envs": {"envs"},
    "eggroll": {"eggroll", "kernels"},
    "zo": {"zo", "eggroll", "kernels"},
    "experiments": {"experiments", "zo", "eggroll", "kernels", "envs"},
}
MAX_LINES = {"kernels": 450}  # 300 elsewhere
FILES = sorted(path for package in ALLOWED for path in (ROOT / package).rglob("*.py"))


def imported_modules(source: str) -> set[str]:
    """Dotted names of everything a module imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.add(node.module or "")
    return names


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_files_are_found():
    assert "eggroll/strategy.py" in map(relative, FILES)


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_follow_the_layers(path: Path):
    package = path.relative_to(ROOT).parts[0]
    tops = {name.split(".")[0] for name in imported_modules(path.read_text())}
    forbidden = tops & {*ALLOWED, "tests"} - ALLOWED[package]
    assert not forbidden, f"{relative(path)} must not import {sorted(forbidden)}"


def test_only_perturbed_imports_quax():
    importers = {relative(path) for path in FILES if "quax" in {n.split(".")[0] for n in imported_modules(path.read_text())}}
    assert importers == {"eggroll/perturbed.py"}


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_file_is_one_noun_of_readable_length(path: Path):
    assert path.name != "utils.py"
    limit = MAX_LINES.get(path.relative_to(ROOT).parts[0], 300)
    assert len(path.read_text().splitlines()) <= limit


def test_checker_sees_imports_of_every_form():
    source = "import a.b\nfrom c import d\ndef f():\n    from e.g import h\n"
    assert imported_modules(source) == {"a.b", "c", "e.g"}
