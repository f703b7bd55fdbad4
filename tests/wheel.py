"""The wheel works without the checkout and next to other distributions: `make wheel`, about a minute, needs a package index.

    tracked files -> sdist -> wheel -> a fresh virtual environment that has top-level packages `kernels` and `envs` of its own

Only the standard library is imported here: the script runs before anything of the project is installed.
"""

import email
import os
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from email.message import Message
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINKED = ("zo", "kernels", "envs", "experiments")  # folders that are packages of `eggroll` through links
EXTRAS = {
    "experiments",
    "rl",
    "llm",
    "tasks",
    "remote",
    "suites",
    "test",
    "dev",
    "all",
}  # some of them
FOREIGN = ("kernels", "envs")
IMPORTS = f"""
import {", ".join(FOREIGN)}
import eggroll, eggroll.zo, eggroll.kernels, eggroll.envs, eggroll.launch
import eggroll.llm.decoding, eggroll.llm.hf, eggroll.runs.remote
assert "site-packages" in eggroll.__file__, eggroll.__file__
for theirs, ours in ((kernels, eggroll.kernels), (envs, eggroll.envs)):
    assert theirs.FOREIGN and theirs is not ours and "eggroll" in ours.__file__
"""


def tracked_files() -> list[str]:
    """Paths of the checkout, links to folders as they are."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [path for path in listing.split("\0") if path and os.path.lexists(ROOT / path)]


def run(python: Path, *arguments: str, folder: Path) -> str:
    """Run a Python that sees no checkout; return what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, *arguments], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise SystemExit(f"error: {' '.join(arguments)} failed with status {done.returncode}.\n{done.stdout}")
    return done.stdout


def make_environment(folder: Path) -> Path:
    """Make a virtual environment; return its Python."""
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


def build(folder: Path) -> Path:
    """Build an sdist of the tracked files, and a wheel of that sdist, each in isolation; return the wheel."""
    source = folder / "source"
    for path in tracked_files():
        target = source / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / path).is_symlink():
            target.symlink_to(os.readlink(ROOT / path))
        else:
            target.write_bytes((ROOT / path).read_bytes())
    python = make_environment(folder / "builder")
    run(python, "-m", "pip", "install", "--quiet", "build", folder=folder)
    run(python, "-m", "build", "--outdir", str(folder / "dist"), str(source), folder=folder)
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


def check_contents(wheel: Path) -> None:
    """The wheel holds every module of the checkout under `eggroll`, no test, and true metadata."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        check_metadata(email.message_from_bytes(archive.read(metadata)))
    assert {name.split("/")[0] for name in names} == {"eggroll", metadata.split("/")[0]}
    modules = {path for path in tracked_files() if path.endswith(".py") and path.split("/")[0] in ("eggroll", *LINKED)}
    expected = {path if path.startswith("eggroll/") else f"eggroll/{path}" for path in modules}
    packed = {name for name in names if name.endswith(".py")}
    assert packed == expected, packed ^ expected
    assert {"eggroll/py.typed", "eggroll/experiments/bench/memory/h100.txtpb"} <= set(names)


def check_metadata(metadata: Message) -> None:
    """Name, version, Python and extras."""
    version = re.search(r'^VERSION = "(.*)"', (ROOT / "eggroll/version.py").read_text(), flags=re.MULTILINE)
    assert version and metadata["Version"] == version[1]
    assert metadata["Name"] == "eggroll-jax" and metadata["Requires-Python"] == ">=3.11"
    assert set(metadata.get_all("Provides-Extra", [])) >= EXTRAS
    named = {requirement.split("[")[0] for requirement in metadata.get_all("Requires-Dist", []) if "eggroll" in requirement}
    assert named == {"eggroll-jax"}, "extras refer to each other by the name of the distribution"


def add_foreign_packages(python: Path, folder: Path) -> dict[Path, bytes]:
    """Put other people's top-level packages where ours must not write; return their files."""
    purelib = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=folder).strip()
    files = {Path(purelib) / name / "__init__.py": b"FOREIGN = True\n" for name in FOREIGN}
    for path, content in files.items():
        path.parent.mkdir()
        path.write_bytes(content)
    return files


def check_installed(wheel: Path, folder: Path, *, constraints: Path) -> None:
    """Import the library with its own dependencies alone, then run the README's example and commands with an extra."""
    python = make_environment(folder / "environment")
    foreign = add_foreign_packages(python, folder)
    install = ("-m", "pip", "install", "--quiet", "--constraint", str(constraints))
    run(python, *install, str(wheel), folder=folder)
    run(python, "-c", IMPORTS, folder=folder)
    run(python, *install, f"{wheel}[rl]", folder=folder)
    run(python, "-m", "pip", "check", folder=folder)
    example = re.search(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    assert example, "README.md has a Python example"
    run(python, "-c", example[1] + "\nassert metrics.mean_fitness < 0", folder=folder)
    assert "usage" in run(python, "-m", "eggroll.journal", "--help", folder=folder)
    assert "usage" in run(python, "-m", "eggroll.experiments.rl", "--help", folder=folder)
    run(python, "-m", "pip", "uninstall", "--quiet", "--yes", "eggroll-jax", folder=folder)
    assert {path: path.read_bytes() for path in foreign} == foreign


def main() -> None:
    """Build, inspect, install, run."""
    constraints = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "constraints.txt").resolve()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = build(folder)
        check_contents(wheel)
        check_installed(wheel, folder, constraints=constraints)
        print(f"{wheel.name}: built, inspected, installed and run")


if __name__ == "__main__":
    main()
