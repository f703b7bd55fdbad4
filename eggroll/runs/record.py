"""`Record`: what a generation reported, on the host."""

import dataclasses
import json
import math
from typing import Any

ARRAYS = ("aux", "coefficients", "fitness", "leaf_norms", "checksums")  # fields of a record that are not one number


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
    aux: Any = None  # reduced over the population, still on the device, not written
    coefficients: Any = None  # float32 [P], still on the device, not written
    fitness: Any = None  # [N] or [N, K], raw, still on the device, not written
    leaf_norms: dict[str, float] = dataclasses.field(default_factory=dict)  # gradient norm of every parameter, by its path
    checksums: Any = None  # uint32 [2, arrays], of the state before and after, not written
    extra: dict[str, float] = dataclasses.field(default_factory=dict)  # held-out scores and the like from callbacks

    def to_json(self) -> str:
        """One line of JSON, without aux and coefficients; NaN and infinities become null."""
        fields = {name: value for name, value in vars(self).items() if name not in (*ARRAYS, "extra")}
        fields |= {name: float(value) for name, value in self.extra.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in fields.items()}
        norms = {path: norm if math.isfinite(norm) else None for path, norm in self.leaf_norms.items()}
        return json.dumps(finite | {"leaf_norms": norms}, allow_nan=False)
