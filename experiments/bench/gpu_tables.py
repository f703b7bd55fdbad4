"""The benchmarks' summaries as Markdown tables, for `gpu_report`."""

from collections.abc import Sequence
from typing import Any


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    cells = [list(header), ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def kernels(summary: dict[str, Any]) -> str:
    """Return goals, peaks and every row of `bench kernels`."""
    goals = [
        (name, number(goal["ratio"]), number(goal["goal"]), _passed(goal["passed"])) for name, goal in summary["goals"].items()
    ]
    rows = [
        (row["op"], row["case"], row["implementation"], row["failed"], "", "", "")
        if "failed" in row
        else (
            *(row[name] for name in ("op", "case", "implementation")),
            *(number(row[name]) for name in ("ms", "roofline", "ratio", "difference")),
        )
        for row in summary["rows"]
    ]
    parts = [
        table(("name", "measured", "goal", "passed"), goals),
        table(("peak", "a second"), [(name, number(value)) for name, value in summary["peak"].items()]),
        table(("op", "case", "implementation", "ms", "roofline", "ratio", "difference"), rows),
    ]
    return "\n\n".join(parts)


def engine(summary: dict[str, Any]) -> str:
    """Return the rows of `bench engine`."""
    rows = {case: row for case, row in summary.items() if case != "about"}
    columns = list(next(iter(rows.values())))
    return table(("case", *columns), [(case, *(number(row[name]) for name in columns)) for case, row in rows.items()])


def memory(summary: dict[str, Any]) -> str:
    """Return predicted next to measured memory of `bench memory --target gpu`."""
    rows = []
    for model, programs in summary["gpu"].items():
        for program, row in programs.items():
            if "failed" in row:
                rows.append((model, program, row["failed"], "", "", ""))
                continue
            predicted, measured = row["predicted_gb"], row["measured_gb"]
            ratio = None if measured is None else measured / predicted
            rows.append((model, program, number(predicted), number(measured), number(ratio), row["implementation"]))
    return table(("model", "program", "predicted GB", "measured GB", "ratio", "implementation"), rows)


def number(value: float | None) -> str:
    """Format a measured number; "-" for none."""
    return "-" if value is None else f"{value:.4g}"


def _passed(value: bool | None) -> str:
    return "not measured" if value is None else "yes" if value else "no"
