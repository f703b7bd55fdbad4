"""Everything that needs a GPU in one report: `python -m eggroll.experiments.bench gpu`, or `make gpu` in a checkout.

Each part is a process with a log of its own, so a part that fails, hangs or kills its process leaves the others whole. The
report is Markdown and is written again after every part. This process leaves the GPU to the parts.
"""

import dataclasses
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from eggroll.experiments.bench import gpu_tables
from eggroll.experiments.common.run import print_summary, run_folder

BENCH = ("-m", "eggroll.experiments.bench")
ROOT = Path(__file__).resolve().parents[2]  # of a checkout; the wheel has no tests
DEVICES = """
import importlib.metadata as metadata, json, jax
gpus = [device for device in jax.devices() if device.platform == "gpu"]
stats = [device.memory_stats() or {} for device in gpus]
names = [name for name in ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "optax", "quax", "numpy")]
installed = {distribution.metadata["Name"]: distribution.version for distribution in metadata.distributions()}
print(json.dumps({
    "backend": jax.default_backend(),
    "gpus": [{"kind": gpu.device_kind, "compute_capability": gpu.compute_capability, "bytes_limit": own.get("bytes_limit")}
             for gpu, own in zip(gpus, stats)],
    "versions": {name: installed[name] for name in names if name in installed},
}))
"""


@dataclasses.dataclass(frozen=True)
class GPU:
    """Run tests and benchmarks on this machine's GPU and write one report."""

    report: Path = Path("gpu-report.md")
    """The report, Markdown."""
    folder: str = "gpu"
    """Folder of the logs, under runs/."""
    parts: tuple[str, ...] = ("tests", "kernels", "engine", "memory")
    """Parts to run."""
    minutes: float = 60
    """Minutes after which a part is stopped."""


class Part(NamedTuple):
    """A command, and the function that turns the JSON on its last line into tables."""

    command: tuple[str, ...]
    tables: Callable[[dict[str, Any]], str] | None


class Outcome(NamedTuple):
    """What became of a part."""

    status: int | None  # None: stopped after its minutes
    seconds: float
    output: str  # standard output and error


PARTS = {
    "tests": Part(("-m", "pytest", "-m", "gpu", "-q", "-rfE", "--tb=short", "tests"), None),
    "kernels": Part((*BENCH, "kernels", "--verbose"), gpu_tables.kernels),
    "engine": Part((*BENCH, "engine"), gpu_tables.engine),
    "memory": Part((*BENCH, "memory", "--target", "gpu"), gpu_tables.memory),
}


def run(config: GPU) -> None:
    """Write the report; the last line of standard output is JSON.

    Raises:
        SystemExit: there is no GPU, or a part failed; the report is written all the same.
    """
    if unknown := [name for name in config.parts if name not in PARTS]:
        raise SystemExit(f"error: parts must be among {', '.join(PARTS)}, got {', '.join(unknown)}.")
    folder = run_folder(config.folder)
    about, lacks = describe_machine()
    sections = ["# GPU report", environment_section(about, lacks)]
    config.report.write_text("\n\n".join(sections) + "\n")
    if lacks:
        print_summary({"report": str(config.report), "about": about, "lacks": lacks})
        raise SystemExit(f"error: no GPU that JAX can use: {' '.join(lacks)} See {config.report}.")
    states = {name: "not run: only a checkout has the tests" for name in config.parts if name == "tests" and not _is_checkout()}
    for name in [name for name in config.parts if name not in states]:
        print(f"{name} ...", flush=True)
        outcome = run_part(PARTS[name].command, folder / f"{name}.log", seconds=60 * config.minutes)
        states[name] = state_of(outcome)
        print(f"{name}: {states[name]}, {outcome.seconds:.0f} s, {folder / f'{name}.log'}", flush=True)
        sections.append(part_section(name, PARTS[name], outcome))
        config.report.write_text("\n\n".join(sections) + "\n")
    print_summary({"report": str(config.report), "about": about, "parts": states})
    if failed := [name for name, state in states.items() if state != "passed"]:
        raise SystemExit(f"error: {', '.join(failed)} did not pass. See {config.report}.")


def describe_machine() -> tuple[dict[str, Any], list[str]]:
    """Return hardware, driver, versions and commit, and sentences that say what is missing to run on a GPU."""
    lacks: list[str] = []
    about: dict[str, Any] = {"date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")}
    about |= {"commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10") or "unknown"}
    about |= {"system": platform.platform(), "python": platform.python_version(), "cpus": os.cpu_count()}
    query = "--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit"
    about["nvidia-smi"] = _output("nvidia-smi", query, "--format=csv,noheader")
    if not about["nvidia-smi"]:
        lacks.append("nvidia-smi shows no GPU (no NVIDIA driver?).")
    found = _last_json(_output(sys.executable, "-c", DEVICES) or "") or {"versions": {}, "gpus": [], "backend": "none"}
    about |= {"versions": found["versions"], "backend": found["backend"], "gpus": found["gpus"]}
    if not any("plugin" in name for name in found["versions"]):
        lacks.append("JAX is installed without CUDA (pip install 'jax[cuda12]').")
    lacks.append(f"JAX sees no GPU, its backend is {found['backend']}.")
    return about, [] if found["gpus"] else lacks


def _is_checkout() -> bool:
    return (ROOT / "tests").is_dir()


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _last_json(output: str) -> dict[str, Any] | None:
    """The last line that is a JSON object."""
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except json.JSONDecodeError:
                continue
    return None


def run_part(command: tuple[str, ...], log: Path, *, seconds: float) -> Outcome:
    """Run a part with this Python, its output in `log`; after `seconds` it is stopped, with all that it started."""
    start = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT if _is_checkout() else None,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(timeout=seconds)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            status = None
    return Outcome(status, time.perf_counter() - start, log.read_text(errors="replace"))


def state_of(outcome: Outcome) -> str:
    """Say in a word or two how a part ended."""
    if outcome.status is None:
        return "stopped after its time limit"
    return "passed" if outcome.status == 0 else f"failed with status {outcome.status}"


def environment_section(about: dict[str, Any], lacks: list[str]) -> str:
    """Return the machine as a table, and what it lacks."""
    gpus = [f"{gpu['kind']}, compute capability {gpu['compute_capability']}" for gpu in about["gpus"]]
    rows = {name: about[name] for name in ("date", "commit", "system", "python", "cpus")}
    rows |= {"GPU and driver": about["nvidia-smi"] or "none", "JAX's devices": "; ".join(gpus) or f"none ({about['backend']})"}
    rows |= about["versions"]
    table = gpu_tables.table(("", ""), [(name, str(value).replace("\n", "; ")) for name, value in rows.items()])
    missing = "\n\nNothing was run:\n\n" + "\n".join(f"- {sentence}" for sentence in lacks) if lacks else ""
    return f"## Environment\n\n{table}{missing}"


def part_section(name: str, part: Part, outcome: Outcome) -> str:
    """Return how a part ended, its tables, and the end of its log."""
    title = f"## {name.capitalize()}\n\n`python {' '.join(part.command)}`: {state_of(outcome)}, {outcome.seconds:.0f} s."
    summary = _last_json(outcome.output)
    tables = ""
    if part.tables is not None and summary is not None:
        try:
            tables = "\n\n" + part.tables(summary)
        except (KeyError, TypeError, ValueError) as error:
            tables = f"\n\nNo table: {type(error).__name__}: {error}"
    lines = [line[:400] for line in outcome.output.replace("```", "'''").splitlines()]
    end = "\n".join(lines[-40:])
    return f"{title}{tables}\n\n<details><summary>end of the log</summary>\n\n```\n{end}\n```\n\n</details>"
