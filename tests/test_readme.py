"""The README is true: its example runs and learns, its tree lists the tracked files, its links exist."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
FOLDERS_IN_ONE_LINE = {"tests"}  # described as a whole


def code_blocks(language: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    return [source for name, source in blocks if name == language]


def listed_paths(tree: str) -> set[str]:
    """Paths of an indented tree, two levels; folders end in a slash."""
    paths, folder = set(), ""
    for line in filter(None, tree.splitlines()):
        name = line.split()[0]
        path = folder + name if line.startswith("  ") else name
        folder = path if not line.startswith("  ") and name.endswith("/") else folder
        paths.add(path)
    return paths


def tracked_paths() -> set[str]:
    """Tracked files and folders of the top two levels; folders end in a slash."""
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    paths = set()
    for parts in (line.split("/") for line in listing.splitlines() if (ROOT / line).exists()):
        paths.add(parts[0] + ("/" if len(parts) > 1 else ""))
        if len(parts) > 1 and parts[0] not in FOLDERS_IN_ONE_LINE:
            paths.add(f"{parts[0]}/{parts[1]}" + ("/" if len(parts) > 2 else ""))
    return paths


def test_tree_lists_exactly_the_tracked_files():
    (tree,) = code_blocks("")
    listed, tracked = listed_paths(tree), tracked_paths()
    assert listed - tracked == set(), "listed in README.md but not tracked"
    assert tracked - listed == set(), "tracked but not listed in README.md"


def test_links_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_example_runs_and_learns(standard_promotion):
    (source,) = code_blocks("python")
    names: dict = {}
    exec(compile(source, "README.md", "exec"), names)
    first = names["metrics"].mean_fitness
    state = names["state"]
    for _ in range(30):
        state, metrics = names["es"].step(state, names["batch"])
    assert metrics.mean_fitness > 0.7 * first  # the fitness is negative: the error fell by 30 % at least
