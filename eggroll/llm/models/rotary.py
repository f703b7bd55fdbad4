"""Rotary positions: pairs of every query and key are turned by angles that grow with the position.

    angle[p, i] = p f[i]           f[i] = theta^(-2 i / d), reduced by the variants for texts longer than those trained on
    (first, second) -> m (first cos - second sin, second cos + first sin)        the halves of a head; m = 1 but for yarn

Variants: linear (f / factor), llama3 (slow turns divided by factor, fast ones kept, blended between), yarn (arXiv 2309.00071: a
ramp over i from kept to divided, and larger products). Fields are named as in the rope_parameters of a config.json.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from eggroll.llm.models.fields import FLOAT32, check_supported, shorten

_SCALED = ("factor", "original_max_position_embeddings")
NEEDED: dict[str, tuple[str, ...]] = {  # by rope_type
    "default": (),
    "linear": ("factor",),
    "llama3": (*_SCALED, "low_freq_factor", "high_freq_factor"),
    "yarn": _SCALED,
}
OPTIONAL = {"yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")}


@dataclasses.dataclass(frozen=True)
class Rotary:
    """A variant and its numbers; those of other variants stay None.

    Args:
        rope_theta: base of the frequencies.
        rope_type: a key of `NEEDED`.
        factor: how many times longer texts may be than those trained on.
        original_max_position_embeddings: length of the texts trained on.
        low_freq_factor, high_freq_factor: llama3: turns over a trained text below which, above which a pair is slow, fast.
        attention_factor: yarn: m; None: from mscale and mscale_all_dim, or from factor.
        beta_fast, beta_slow: yarn: turns over a trained text where the ramp begins and ends; None: 32 and 1.
        mscale, mscale_all_dim: yarn, see attention_factor.
        truncate: yarn: whether the ramp begins and ends at whole pairs; None: it does.

    Raises:
        ValueError: an unknown variant, or a number that is missing or not positive.
    """

    rope_theta: float = 10000.0
    rope_type: str = "default"
    factor: float | None = None
    original_max_position_embeddings: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None

    def __post_init__(self):
        if not isinstance(self.rope_type, str) or self.rope_type not in NEEDED:
            raise ValueError(f"rotary positions must be of type {', '.join(NEEDED)}, got {shorten(self.rope_type)}.")
        for name in ("rope_theta", *NEEDED[self.rope_type]):
            self._check_number(name, getattr(self, name))
        for name in OPTIONAL.get(self.rope_type, ()):
            if name != "truncate" and getattr(self, name):
                self._check_number(name, getattr(self, name))
        if self.rope_type == "yarn" and self.rope_theta <= 1:
            raise ValueError(f"'rope_theta' of 'yarn' rotary positions must be above 1, got {self.rope_theta}.")
        if self.truncate is not None and not isinstance(self.truncate, bool):
            raise ValueError(f"'truncate' of rotary positions must be true or false, got {shorten(self.truncate)}.")
        if self.low_freq_factor and self.high_freq_factor and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor must be below high_freq_factor, got {self.low_freq_factor} and {self.high_freq_factor}."
            )

    def _check_number(self, name: str, value: Any) -> None:
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < FLOAT32:
            raise ValueError(f"'{name}' of '{self.rope_type}' rotary positions must be a number > 0, got {shorten(value)}.")

    def frequencies(self, size: int) -> np.ndarray:
        """Return f, float32 [size / 2]."""
        plain = 1 / np.float32(self.rope_theta) ** (np.arange(0, size, 2, dtype=np.float32) / np.float32(size))
        if self.rope_type == "default":
            return plain
        slow = plain / np.float32(self.factor)
        if self.rope_type == "linear":
            return slow
        share = self._llama3_share(plain) if self.rope_type == "llama3" else self._yarn_share(size)
        return (slow * (1 - share) + plain * share).astype(np.float32)

    def _llama3_share(self, plain: np.ndarray) -> np.ndarray:
        """Return which share of every frequency is kept, from 0 to 1."""
        assert self.original_max_position_embeddings and self.low_freq_factor and self.high_freq_factor
        turns = self.original_max_position_embeddings * plain / (2 * np.pi)
        return np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)

    def _yarn_share(self, size: int) -> np.ndarray:
        def pair_of(turns: float) -> float:
            assert self.original_max_position_embeddings is not None
            full = math.log(self.original_max_position_embeddings / (2 * math.pi * turns))
            return size * full / (2 * math.log(self.rope_theta))

        begin, end = pair_of(self.beta_fast or 32), pair_of(self.beta_slow or 1)
        if self.truncate is not False:
            begin, end = math.floor(begin), math.ceil(end)
        begin, end = max(begin, 0), min(end, size - 1)
        ramp = (np.arange(size // 2) - begin) / (end - begin if end != begin else 0.001)
        return 1 - np.clip(ramp, 0, 1)

    @property
    def magnitude(self) -> float:
        """Return m."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor

        def growth(weight: float) -> float:
            assert self.factor is not None
            return 0.1 * weight * math.log(self.factor) + 1 if self.factor > 1 else 1.0

        if self.mscale and self.mscale_all_dim:
            return growth(self.mscale) / growth(self.mscale_all_dim)
        return growth(1.0)


def from_fields(fields: Mapping[str, Any]) -> Rotary:
    """Read `rope_parameters` of a config.json, or the older `rope_theta` and `rope_scaling`.

    Raises:
        ValueError: a variant that is not supported, or one without its numbers.
    """
    given = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    if not isinstance(given, Mapping) or any(isinstance(value, Mapping) for value in given.values()):
        raise ValueError(f"rotary positions in config.json must be one object for all layers, got {shorten(given)}.")
    for place in (fields, given):
        check_supported({"model_type": fields.get("model_type"), **place}, "partial_rotary_factor", 1.0)
    kind = given.get("rope_type", given.get("type", "default"))
    longest = fields.get("max_position_embeddings")
    defaults = {"rope_theta": fields.get("rope_theta") or 10000.0, "original_max_position_embeddings": longest}
    known = defaults | {name: value for name, value in given.items() if value is not None}
    if fields.get("original_max_position_embeddings"):
        known["original_max_position_embeddings"] = fields["original_max_position_embeddings"]
    known_kind = kind if isinstance(kind, str) else ""
    names = ("rope_theta", *NEEDED.get(known_kind, ()), *OPTIONAL.get(known_kind, ()))
    return Rotary(rope_type=kind, **{name: known[name] for name in names if name in known})


def to_fields(rotary: Rotary) -> dict[str, Any]:
    """Return the fields of a config.json, readable by transformers before and after 5."""
    parameters = {name: value for name, value in dataclasses.asdict(rotary).items() if value is not None}
    older = {} if rotary.rope_type == "default" else {"rope_scaling": parameters}
    return {"rope_theta": rotary.rope_theta, "rope_parameters": parameters, **older}


def tables(rotary: Rotary, position: Array, size: int) -> tuple[Array, Array]:
    """Return m cos and m sin of every position and frequency: two float32 [B, T, size / 2] from int32 [B, T]."""
    angles = position.astype(jnp.float32)[..., None] * rotary.frequencies(size)
    return jnp.cos(angles) * rotary.magnitude, jnp.sin(angles) * rotary.magnitude


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate the first half of each head against its second half: [B, T, heads, d]."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
