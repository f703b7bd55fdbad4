"""The report of a GPU: what is missing without one, and parts that fail one by one."""

import json

import jax
import pytest

from eggroll.experiments.bench import gpu_report, gpu_tables, kernels
from eggroll.experiments.bench.gpu_report import GPU, Part

MACHINE = {
    "date": "today",
    "commit": "abc",
    "system": "Linux",
    "python": "3.11",
    "cpus": 2,
    "nvidia-smi": "NVIDIA H100, 570.00",
    "versions": {"jax": "0.10.2"},
    "backend": "gpu",
    "gpus": [{"kind": "NVIDIA H100", "compute_capability": "9.0", "bytes_limit": 80}],
}


@pytest.fixture
def config(tmp_path):
    return GPU(report=tmp_path / "report.md", folder=str(tmp_path / "logs"))


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there the parts run")
def test_without_a_gpu_the_report_says_what_is_missing(config, capsys):
    with pytest.raises(SystemExit, match=r"error: no GPU that JAX can use: .*JAX sees no GPU, its backend is cpu") as error:
        gpu_report.run(config)
    report = config.report.read_text()
    assert str(config.report) in str(error.value) and "JAX sees no GPU, its backend is cpu." in report
    assert f"| jax | {jax.__version__} |" in report and "## Tests" not in report
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["about"]["gpus"] == []


def test_a_part_that_fails_leaves_the_others_whole(config, capsys, monkeypatch):
    memory = {"gpu": {"1b": {"plain": {"failed": "out of memory"}}}}
    parts = {
        "kills": Part(("-c", "import os, signal; print('begun', flush=True); os.kill(os.getpid(), signal.SIGKILL)"), None),
        "memory": Part(("-c", f"print('text'); print('{json.dumps(memory)}')"), gpu_tables.memory),
        "hangs": Part(("-c", "import time; print('waiting', flush=True); time.sleep(60)"), None),
        "other": Part(("-c", "print('{\"a\": 1}')"), gpu_tables.engine),
    }
    monkeypatch.setattr(gpu_report, "PARTS", parts)
    monkeypatch.setattr(gpu_report, "describe_machine", lambda: (MACHINE, []))
    with pytest.raises(SystemExit, match=r"error: kills, hangs did not pass"):
        gpu_report.run(GPU(config.report, config.folder, tuple(parts), minutes=0.01))
    report = config.report.read_text()
    assert "failed with status -9" in report and "begun" in report and "NVIDIA H100, compute capability 9.0" in report
    assert "| 1b | plain | out of memory |" in report and "stopped after its time limit" in report and "waiting" in report
    assert "No table: TypeError" in report, "an unexpected summary is not an error"
    states = json.loads(capsys.readouterr().out.splitlines()[-1])["parts"]
    assert list(states) == list(parts) and states["memory"] == states["other"] == "passed"


def test_tables_of_the_summaries():
    row = {"op": "int8_dot", "case": "egg", "implementation": "plain"}
    numbers = {"ms": 1.0, "roofline": 0.51234, "ratio": None, "difference": None}
    summary = {"goals": kernels.goals_of([]), "peak": {"copy": 2e3}, "rows": [row | numbers, row | {"failed": "a|b"}]}
    text = gpu_tables.kernels(summary)
    assert "| int8_dot | egg | plain | 1 | 0.5123 | - | - |" in text and "| a\\|b |" in text
    assert "| paper_values | - | 0.97 | not measured |" in text
    assert gpu_tables.engine({"mlp": {"ms": 2.0}, "about": {}}).splitlines()[-1] == "| mlp | 2 |"
    measured = {"predicted_gb": 2.0, "measured_gb": 2.5, "implementation": "reference"}
    assert "| 1b | plain | 2 | 2.5 | 1.25 | reference |" in gpu_tables.memory({"gpu": {"1b": {"plain": measured}}})


def test_unknown_part_is_refused_by_a_clear_error(config):
    with pytest.raises(SystemExit, match="error: parts must be among tests, kernels, engine, memory, got speed"):
        gpu_report.run(GPU(config.report, config.folder, ("speed",)))
