"""`Record`: what a generation reported, on the host, and as a line of `metrics.jsonl`."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from eggroll.runs.metrics import read_metrics

ARRAYS = ("aux", "coefficients", "fitness", "leaf_norms", "checksums", "batch")  # fields that are not one number


@dataclasses.dataclass(frozen=True)
class Record:
    """What one generation reported, on the host; the numbers are those of `Metrics`."""

    generation: int
    sigma: float
    mean_fitness: float
    best_fitness: float
    std_fitness: float
    invalid: int
    tied_pairs: float
    pair_correlation: float
    effective_rank: float
    skipped: bool
    gradient_norm: float
    moved: float
    kept: int
    update_over_sigma: float
    update_over_weights: float
    weight_norm: float
    seconds: float  # wall time of the generation, compilation included
    members_per_second: float
    aux: Any = None  # reduced over the population, on the device unless it was part of a scan, not written
    coefficients: Any = None  # float32 [P], where aux is, not written
    fitness: Any = None  # [N] or [N, K], raw, on the device, not written; None for a generation of a scan
    leaf_norms: dict[str, float] = dataclasses.field(default_factory=dict)  # gradient norm of every parameter, by its path
    checksums: Any = None  # uint32 [2, arrays], of the state before and after, not written
    batch: Any = None  # with `next_batch`: of the next generation, not written
    extra: dict[str, float] = dataclasses.field(default_factory=dict)  # held-out scores and the like from callbacks

    def to_json(self) -> str:
        """One line of JSON, without the arrays; NaN and infinities become null."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if _is_number(field)}
        fields |= {name: float(value) for name, value in self.extra.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in fields.items()}
        norms = {path: norm if math.isfinite(norm) else None for path, norm in self.leaf_norms.items()}
        return json.dumps(finite | {"leaf_norms": norms}, allow_nan=False)


def read_records(folder: Path) -> list[Record]:
    """Return the records of all generations of a run, from its `metrics.jsonl`; numbers that were not finite are NaN.

    Lines that a front end adds, which are of no generation, are left out.
    """
    return [_from_fields(fields) for fields in read_metrics(folder) if "sigma" in fields]


def _from_fields(fields: dict[str, Any]) -> Record:
    norms = {path: math.nan if norm is None else norm for path, norm in fields.pop("leaf_norms", {}).items()}
    numbers = {name: math.nan if value is None else value for name, value in fields.items()}
    names = [field.name for field in dataclasses.fields(Record) if _is_number(field)]
    own: dict[str, Any] = {name: numbers.pop(name, math.nan) for name in names}
    return Record(**own, leaf_norms=norms, extra=numbers)


def _is_number(field: dataclasses.Field) -> bool:
    return field.name not in (*ARRAYS, "extra")
