"""README and docs are true: the example runs and learns, the tree lists the folders, links and anchors exist."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LISTED_AS_A_WHOLE = {"docs", "tests"}  # one line of the tree each
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")
FILES = {path for path in TRACKED if path and (ROOT / path).exists()}
PAGES = sorted(path for path in FILES if path.endswith(".md"))


def code_blocks(page: str, language: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    return [source for name, source in blocks if name == language]


def listed_paths(tree: str) -> list[str]:
    """Paths of a tree indented by two spaces a level; folders end in a slash."""
    paths: list[str] = []
    folders: list[str] = []
    for line in filter(None, tree.splitlines()):
        level, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders[level:] = [name]
        paths.append("".join(folders))
    return paths


def folders_of_two_levels() -> set[str]:
    """Tracked folders at the top and one below; links are the folders they point to."""
    parts = [path.split("/") for path in FILES]
    deep = {f"{a}/{b}/" for a, b, *rest in (part for part in parts if len(part) > 2) if a not in LISTED_AS_A_WHOLE}
    return deep | {f"{part[0]}/" for part in parts if len(part) > 1}


def anchors(page: Path) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_tree_lists_every_folder_and_only_what_exists():
    (tree,) = code_blocks("docs/design.md", "tree")
    listed = listed_paths(tree)
    assert len(listed) == len(set(listed))
    folders = folders_of_two_levels()
    assert {path for path in listed if path.endswith("/")} == folders
    assert {path for path in listed if not path.endswith("/")} <= FILES
    assert {path for path in FILES if "/" not in path} <= set(listed), "every file at the top level has a line"


@pytest.mark.parametrize("page", PAGES)
def test_links_exist(page):
    for target, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]+))?\)", (ROOT / page).read_text()):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


def names_something(name: str) -> bool:
    """Whether a dotted name, with or without the prefix `eggroll.`, is a module, or a name in the text of one."""
    parts = name.split(".")
    parts = parts[1:] if parts[0] == "eggroll" and f"eggroll/{parts[1]}" in FILES else parts  # a link
    path = parts.pop(0)
    while parts and any(file.startswith((f"{path}/{parts[0]}.py", f"{path}/{parts[0]}/")) for file in FILES):
        path += f"/{parts.pop(0)}"
    source = next(file for file in (f"{path}.py", f"{path}/__init__.py", f"{path}/__main__.py") if file in FILES)
    return not parts or re.search(rf"\b{parts[0]}\b", (ROOT / source).read_text()) is not None


@pytest.mark.parametrize("page", sorted(set(PAGES) - {"CHANGELOG.md", "experiments/LOG.md"}))
def test_named_files_and_modules_exist(page):
    """The changelog and the log name what there was."""
    text = (ROOT / page).read_text()
    roots = "eggroll|zo|kernels|envs|experiments"
    files = set(re.findall(rf"(?<![\w/.-])((?:{roots}|tests)/[\w/]+\.py)\b", text))
    assert files <= FILES, files - FILES
    code = " ".join(re.findall(r"`[^`\n]+`", text)) + "".join(re.findall(r"^```.*?^```$", text, flags=re.MULTILINE | re.DOTALL))
    names = set(re.findall(rf"(?<![\w./-])((?:{roots})(?:\.[A-Za-z_]\w*)+)(?![\w/])", code))
    wrong = {name for name in names if not name.endswith((".md", ".py")) and not names_something(name)}
    assert not wrong


@pytest.mark.slow  # the test of the wheel runs it too
def test_example_runs_and_learns(standard_promotion, capsys):
    (source,) = code_blocks("README.md", "python")
    names: dict = {}
    exec(compile(source, "README.md", "exec"), names)
    initial = names["net"].init(names["jax"].random.key(0), names["jnp"].zeros((1, 2)))
    assert names["metrics"].mean_fitness > 0.7 * names["fitness"](initial, names["batch"], None)  # the error fell by 30 %
    assert "params/Dense_0/kernel" in capsys.readouterr().out
