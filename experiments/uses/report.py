"""The results of a run: a row for every use, their summary, and both tables as markdown."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from eggroll.experiments.uses.check import ROLES, Finding
from eggroll.experiments.uses.table import FAMILIES, FAMILY


@dataclasses.dataclass(frozen=True)
class Row:
    """One use in the table."""

    name: str
    finding: Finding | None  # None: its package is not installed
    ratio: float | None = None  # seconds of the plain function over those of the population

    @property
    def role(self) -> str:
        """The finding's role, or `skipped`."""
        return self.finding.role if self.finding else "skipped"


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Counts of the roles, and the names of what is wrong."""
    counts = {role.replace("-", "_"): sum(row.role == role for row in rows) for role in (*reversed(ROLES), "skipped")}
    right = sum(row.role not in ("wrong", "skipped") for row in rows)
    return {"uses": len(rows), "right": right, **counts, "wrong_names": [row.name for row in rows if row.role == "wrong"]}


def as_json(row: Row) -> dict[str, Any]:
    """A row for `uses.json`."""
    finding = dataclasses.asdict(row.finding) if row.finding else {"note": "its package is not installed"}
    return {"name": row.name, "family": FAMILY[row.name], **finding, "role": row.role, "ratio": row.ratio}


def markdown(rows: Sequence[Row], comparisons: Mapping[str, Mapping[str, float]]) -> str:
    """Both tables."""
    lines = ["| family | use | role | error | ratio | note |", "|---|---|---|---|---|---|"]
    for family in FAMILIES:
        for row in rows:
            if FAMILY[row.name] == family:
                cells = (
                    family,
                    row.name,
                    row.role,
                    _error(row.finding),
                    number(row.ratio),
                    row.finding.note if row.finding else "",
                )
                lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    if comparisons:
        lines += ["", "| use | ratio | with dense noise | of a generation | with dense noise |", "|---|---|---|---|---|"]
        forms = ("low-rank", "dense", "low-rank generation", "dense generation")
        for name, own in comparisons.items():
            lines.append(f"| {name} | {' | '.join(number(own.get(form)) for form in forms)} |")
    return "\n".join(lines) + "\n"


def _error(finding: Finding | None) -> str:
    return "-" if finding is None or finding.error is None else f"{finding.error:.1e}"


def number(value: float | None) -> str:
    """A ratio for people."""
    return "-" if value is None else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"
