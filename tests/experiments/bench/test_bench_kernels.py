"""The benchmark of kernels, in small: a row for every implementation, numbers that belong together, reasons where none."""

import json

import jax
import jax.numpy as jnp
import pytest

from eggroll.experiments.bench import kernel_work, kernels
from eggroll.experiments.bench.kernel_work import Call, Work
from eggroll.experiments.bench.timing import queued_ms
from eggroll.kernels.int8_dot.cases import MEASURED as INT8
from eggroll.kernels.lowrank_dot.cases import MEASURED as DOT
from eggroll.kernels.lowrank_update.cases import MEASURED as UPDATE

PEAK = kernels.Peak({"bfloat16": 1e9, "int8": 1e9}, 1e9, 0.001)
SETTINGS = kernels.Settings(small=True, repeats=2, round_ms=0.0)


def run(capsys, **options):
    kernels.run(kernels.Kernels(repeats=2, small=True, **options))
    *lines, last = capsys.readouterr().out.splitlines()
    return lines, json.loads(last)


@pytest.mark.slow
def test_last_line_is_json_with_every_row_of_the_table(capsys):
    lines, summary = run(
        capsys, ops=("lowrank_dot", "lowrank_update", "int8_dot", "together"), cases=("paper-keys", "policy", "egg")
    )
    assert set(summary) == {"about", "peak", "rows", "goals"}
    assert {"device", "commit", "jax", "jaxlib", "small", "rounds"} <= set(summary["about"])
    assert all(value > 0 for value in summary["peak"].values())
    rows = summary["rows"]
    table = [line.split()[:3] for line in lines if line.split()[0] in kernels.OPS]
    assert table == [[row["op"], row["case"], row["implementation"].split()[0]] for row in rows]
    assert {(row["op"], row["case"]) for row in rows} == {
        ("lowrank_dot", "paper-keys"),
        ("lowrank_dot", "policy-mlp"),
        ("lowrank_update", "paper-keys"),
        ("int8_dot", "egg-256-mlp"),
        ("together", "paper-keys"),
    }
    for row in rows:
        assert ("failed" in row) == row["implementation"].startswith("mosaic_gpu") or jax.default_backend() == "gpu"
        if "failed" not in row:
            plain = next(other for other in rows if other["case"] == row["case"] and other["op"] == row["op"])
            assert row["ratio"] == pytest.approx(plain["ms"] / row["ms"]) and row["roofline"] > 0
    dense = next(row for row in rows if row["implementation"] == "dense")
    assert dense["case"] == "policy-mlp" and 0 <= dense["difference"] < 2.0**-6


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there the kernels run")
def test_kernel_that_cannot_run_says_why(capsys):
    lines, summary = run(capsys, ops=("int8_dot",), cases=("egg",))
    failed = [row for row in summary["rows"] if "failed" in row]
    assert [row["implementation"] for row in failed] == ["mosaic_gpu", "mosaic_gpu 128"]
    for row in failed:
        assert "needs a GPU, the default backend is cpu" in row["failed"] and row["config"]["tile_columns"] in (64, 128)
        assert any(line.endswith(row["failed"]) for line in lines)


def test_figures_of_shrunk_cases_are_no_goals(capsys):
    _, summary = run(capsys, ops=("together",), cases=("paper-values",))
    assert summary["goals"] == {name: {"goal": goal, "ratio": None, "passed": None} for name, goal in kernels.GOALS.items()}


def test_goals_take_the_kernel_with_its_own_tiles_and_the_slowest_case():
    def row(case, ratio, implementation="mosaic_gpu", op="lowrank_dot"):
        return {"op": op, "case": case, "implementation": implementation, "ratio": ratio}

    rows = [row("paper-keys", 0.96), row("paper-keys", 0.99, "mosaic_gpu before 128"), row("paper-keys", 1.0, "reference")]
    decode = [case.name for case in DOT if case.name.startswith("decode-")]
    rows += [*(row(case, 0.97) for case in decode[1:]), row(decode[0], 0.93), row("paper-keys", 0.5, op="together")]
    goals = kernels.goals_of(rows)
    assert goals["paper_keys"] == {"goal": 0.95, "ratio": 0.96, "passed": True}
    assert goals["decode"] == {"goal": 0.95, "ratio": 0.93, "passed": False}
    assert goals["forward_and_update"] == {"goal": 0.9, "ratio": 0.5, "passed": False}
    assert goals["paper_values"] == {"goal": 0.97, "ratio": None, "passed": None}
    missing = [found for found in rows if found["case"] != decode[-1]]
    failed = {"op": "lowrank_dot", "case": decode[-1], "implementation": "mosaic_gpu", "failed": "too large"}
    for some in (missing, [*missing, failed]):
        assert kernels.goals_of(some)["decode"] == {"goal": 0.95, "ratio": None, "passed": None}


def measured(calls, **options):
    work = Work("op", "case", "shape", {name: Call(call) for name, call in calls.items()}, 1.0, 1.0, **options)
    return {row["implementation"]: row for row in kernels.measure("op", "case", lambda: work, PEAK, SETTINGS)}


def test_wrong_result_is_no_row_of_numbers():
    ones = jnp.ones((2, 3))
    rows = measured(
        {"reference": lambda: ones, "right": lambda: ones + 0.0, "wrong": lambda: 1.1 * ones, "nan": lambda: ones / 0}
    )
    assert rows["right"]["difference"] == 0.0 and rows["right"]["ms"] > 0
    assert "differs from the reference by 1.0e-01 of its largest" in rows["wrong"]["failed"]
    assert "differs from the reference by" in rows["nan"]["failed"]
    exact = measured({"reference": lambda: ones, "near": lambda: ones + 1e-3}, dtype="int8", tolerance=0.0)
    assert "tolerance 0.0e+00" in exact["near"]["failed"]
    both = measured({"reference": lambda: (ones, ones), "second": lambda: (ones, 2 * ones)})
    assert "differs from the reference by 1.0e+00" in both["second"]["failed"]
    large = jnp.full((2,), 1 << 26, jnp.int32)  # float32 does not see the difference
    assert "failed" in measured({"reference": lambda: large, "near": lambda: large + 1}, tolerance=0.0)["near"]


def test_error_of_one_call_is_its_own_and_one_line():
    def breaks():
        raise RuntimeError("two\n  lines")

    rows = measured({"reference": lambda: jnp.ones(2), "broken": breaks})
    assert rows["broken"]["failed"] == "RuntimeError: two lines" and "ms" in rows["reference"]
    (row,) = kernels.measure("op", "case", breaks, PEAK, SETTINGS)
    assert row == {"op": "op", "case": "case", "implementation": "all", "failed": "RuntimeError: two lines"}


def test_error_while_timing_fails_the_rows_but_not_the_run():
    counts = []

    def breaks_later():
        counts.append(1)
        if len(counts) > 2:
            raise RuntimeError("device lost")
        return jnp.ones(2)

    rows = measured({"reference": lambda: jnp.ones(2), "late": breaks_later})
    assert {row["failed"] for row in rows.values()} == {"RuntimeError: device lost"}


def test_roofline_is_the_larger_of_both_limits():
    work = Work("op", "case", "shape", {}, operations=2e6, bytes=3e6)
    assert PEAK.roofline_ms(work) == pytest.approx(3.0)
    assert PEAK.roofline_ms(work._replace(operations=8e6)) == pytest.approx(8.0)


@pytest.mark.parametrize(("op", "cases"), [("lowrank_dot", DOT), ("lowrank_update", UPDATE), ("int8_dot", INT8)])
def test_every_measured_case_is_there(op, cases):
    assert [name for name, _ in kernel_work.works(op, small=False)] == [case.name for case in cases]


def test_size_of_the_paper_workload():
    _, make = kernel_work.works("lowrank_dot", small=True)[0]
    work = make()  # 8 pairs of 2 rows, 256 x 256
    assert work.operations == 2 * 16 * 256 * 256 and work.bytes == 2 * (2 * 16 * 256 + 256 * 256)


def test_short_calls_are_queued():
    calls = []
    assert queued_ms({"a": lambda: calls.append(1) or jnp.zeros(())}, repeats=2, round_ms=1e6)["a"] > 0
    assert len(calls) == 3 + 4 * 100


@pytest.mark.slow
def test_generation_beside_inference(capsys):
    _, summary = run(capsys, ops=("generation",))
    plain, generation = summary["rows"]
    assert plain["implementation"] == "plain" and generation["implementation"] == "reference"
    assert generation["ratio"] == pytest.approx(plain["ms"] / generation["ms"]) and "8 members" in plain["shape"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"ops": ("lowrank",)}, "ops must be among lowrank_dot, lowrank_update, int8_dot, together, generation, got lowrank"),
        ({"repeats": 0}, "repeats must be an integer >= 1, got 0"),
        ({"tokens": 0}, "tokens must be an integer >= 1, got 0"),
    ],
)
def test_wrong_options_are_refused_by_a_clear_error(options, sentence):
    with pytest.raises(SystemExit, match=f"error: {sentence}"):
        kernels.run(kernels.Kernels(**options))
