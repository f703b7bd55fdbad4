"""Rules: which kind of noise the user asks for, by parameter path.

A perturbation is one spec for all parameters, or a list of rules (pattern, spec): `re.fullmatch` on the path, the first match
wins, a rule that matches nothing is an error. Collections that are not parameters (`variables`) are frozen,
except by rules whose pattern matches no parameter. An int8 parameter under `LowRank`, `Dense` or `Flipout` is *quantised*: a
member sees float(Q) + sigma E where its function converts it to a floating dtype, sigma in units of one integer.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from eggroll.kernels.hopper import IMPLEMENTATIONS
from eggroll.noise import addresses
from eggroll.noise.variables import collections


@dataclasses.dataclass(frozen=True)
class LowRank:
    """Noise E = A B^T / sqrt(rank) for matrices, dense noise of the same distribution for other leaves.

    Args:
        rank: number of terms, >= 1.
        distribution: of the factors' entries, "rademacher" (fastest, packed bits) or "normal" (as in the paper).
        sigma_multiplier: this leaf's sigma relative to the strategy's.
        refresh: generations that share the right factor of a matrix; the left one is always fresh. Above 1 this is the lazily
            refreshed subspace of LOZO (arXiv 2410.07698).
        implementation: of the products, "reference" (plain JAX) or "mosaic_gpu" (kernels for Hopper GPUs); None: the kernel
            where it runs and covers the parameter. The plan says which.
    """

    rank: int = 1
    distribution: addresses.Distribution = "rademacher"
    sigma_multiplier: float = 1.0
    refresh: int = 1
    implementation: str | None = dataclasses.field(default=None, repr=False)  # not part of a run's identity


@dataclasses.dataclass(frozen=True)
class Dense:
    """Noise with independent entries, as in classical OpenAI-ES; costs m n values per member."""

    distribution: addresses.Distribution = "normal"
    sigma_multiplier: float = 1.0


@dataclasses.dataclass(frozen=True)
class Flipout:
    """Noise U o (r s^T) for matrices: all members of a generation share U, a pair has its own signs r and s.

    One product with U serves all members (Flipout, arXiv 1803.04386). Members are uncorrelated, but share |U|. Other leaves,
    and convolutions, get dense noise of the same distribution.

    Args:
        distribution: of the entries of U.
        sigma_multiplier: this leaf's sigma relative to the strategy's.
    """

    distribution: addresses.Distribution = "normal"
    sigma_multiplier: float = 1.0
    rank: ClassVar[int] = 1  # of r s^T


@dataclasses.dataclass(frozen=True)
class Integer:
    """Noise of int8 parameters, in integers throughout: E = A B^T / sqrt(rank) for matrices, dense for other leaves.

    Args:
        rank: number of terms, >= 1.
        distribution: of the factors' entries, "normal" (multiples of 1/16, |.| < 3.7) or "rademacher".
        shift: sigma is 2^-shift where the integer 16 stands for 1, 0 to 16, or to 4 for "rademacher": signs of less than one
            integer would vanish where they are added to a weight. The strategy's `sigma` is None.
        update: what is summed over the pairs, the factors' "value" or only their "sign".
        implementation: as of `LowRank`.
    """

    rank: int = 1
    distribution: addresses.Distribution = "normal"
    shift: int = 4
    update: Literal["value", "sign"] = "value"
    implementation: str | None = dataclasses.field(default=None, repr=False)


@dataclasses.dataclass(frozen=True)
class Frozen:
    """No noise and no update: what collections that are not parameters get by default."""


Noisy = LowRank | Dense | Flipout | Integer
Spec = Noisy | Frozen
Perturbation = Spec | Sequence[tuple[str, Spec]]


def paths(params: Any) -> list[str]:
    """Path of every leaf, such as "params/Dense_0/kernel", in leaf order."""
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(params)]


def check_params(params: Any, perturbation: Perturbation) -> None:
    """Raise TypeError or ValueError unless there are leaves, all arrays with paths of their own, of dtypes that rules take."""
    leaves, leaf_paths = jax.tree.leaves(params), paths(params)
    if not leaves:
        raise ValueError("params has no array leaves; expected a pytree of parameters such as model.init(...).")
    for path, leaf in zip(leaf_paths, leaves, strict=True):
        if leaf_paths.count(path) > 1:
            raise ValueError(f"two parameters have the path '{path}'; rename a key that contains '/'.")
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise TypeError(
                f"params leaf '{path}' is a {type(leaf).__name__}, expected an array; split arrays from the rest first "
                "(nnx.split, equinox.partition)."
            )
    for path, leaf, spec in zip(leaf_paths, leaves, match_rules(perturbation, params), strict=True):
        if isinstance(spec, Integer) and leaf.dtype != jnp.int8:
            raise ValueError(f"parameter '{path}' has dtype {leaf.dtype}; Integer() is for int8 parameters.")
        if not isinstance(spec, Integer | Frozen) and not _takes_floating_noise(leaf):
            raise ValueError(
                f"parameter '{path}' has dtype {leaf.dtype}, which no floating perturbation fits; put the rule "
                f"('{re.escape(path)}', eggroll.Frozen()) first in `perturbation`"
                + (", or keep it as two real parameters." if jnp.issubdtype(leaf.dtype, jnp.complexfloating) else ".")
            )


def _takes_floating_noise(leaf: Any) -> bool:
    return leaf.dtype == jnp.int8 or bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def is_quantised(leaf: Any, spec: Spec) -> bool:
    """Whether a leaf is int8 under floating noise: integers that the function converts to a floating dtype."""
    return leaf.dtype == jnp.int8 and isinstance(spec, LowRank | Dense | Flipout)


def quantised_leaves(params: Any, perturbation: Perturbation) -> tuple[bool, ...]:
    """Whether every leaf, in leaf order, is quantised.

    Raises:
        ValueError: an unused rule, or a leaf without a rule.
    """
    specs = match_rules(perturbation, params)
    return tuple(is_quantised(leaf, spec) for leaf, spec in zip(jax.tree.leaves(params), specs, strict=True))


def refuse_quantised(params: Any, perturbation: Perturbation) -> None:
    """Raise ValueError if a leaf is quantised, for strategies that only update floats."""
    for path, on_grid in zip(paths(params), quantised_leaves(params, perturbation), strict=True):
        if on_grid:
            raise ValueError(
                f"int8 parameter '{path}' evolves under eggroll.EvolutionStrategy only: give it the rule Frozen()."
            )


def check_perturbation(perturbation: Perturbation) -> list[tuple[str, Spec]]:
    """Return `perturbation` as a list of rules.

    Raises:
        TypeError, ValueError: not a spec or rules, an invalid pattern, rank < 1, an unknown distribution, a multiplier <= 0.
    """
    rules = [(".*", perturbation)] if isinstance(perturbation, Spec) else perturbation
    if not isinstance(rules, list | tuple) or not all(isinstance(rule, list | tuple) and len(rule) == 2 for rule in rules):
        raise TypeError(
            "perturbation must be LowRank(...), Dense(...), Flipout(...), Integer(...), Frozen() or a list of (path pattern, "
            f"one of those), got {perturbation!r}."
        )
    for pattern, spec in rules:
        _check_rule(pattern, spec)
    return [(pattern, spec) for pattern, spec in rules]


def _check_rule(pattern: Any, spec: Any) -> None:
    if not isinstance(spec, Spec):
        raise TypeError(f"perturbation rule {pattern!r} must map to LowRank, Dense, Flipout, Integer or Frozen, got {spec!r}.")
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"perturbation pattern {pattern!r} is not a regular expression: {error}.") from None
    if isinstance(spec, LowRank | Integer) and not (isinstance(spec.rank, int) and spec.rank >= 1):
        raise ValueError(f"rank must be an integer >= 1, got {spec.rank!r}.")
    if isinstance(spec, LowRank | Integer) and spec.implementation not in (None, *IMPLEMENTATIONS):
        names = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"implementation must be None or one of {names}, got {spec.implementation!r}.")
    if isinstance(spec, LowRank) and not (isinstance(spec.refresh, int) and spec.refresh >= 1):
        raise ValueError(f"refresh must be an integer >= 1, got {spec.refresh!r}.")
    if not isinstance(spec, Frozen) and spec.distribution not in addresses.DISTRIBUTIONS:
        raise ValueError(f"distribution must be one of {', '.join(addresses.DISTRIBUTIONS)}, got {spec.distribution!r}.")
    if isinstance(spec, Integer):
        most = 16 if spec.distribution == "normal" else 4
        if not (isinstance(spec.shift, int) and 0 <= spec.shift <= most):
            raise ValueError(f"shift must be an integer from 0 to {most} for {spec.distribution} factors, got {spec.shift!r}.")
        if spec.update not in ("value", "sign"):
            raise ValueError(f"update must be 'value' or 'sign', got {spec.update!r}.")
        if (spec.update, spec.distribution) == ("sign", "rademacher"):
            raise ValueError("update 'sign' has no effect with rademacher factors, which are signs; leave it out.")
    if isinstance(spec, LowRank | Dense | Flipout) and not spec.sigma_multiplier > 0:
        raise ValueError(f"sigma_multiplier must be > 0, got {spec.sigma_multiplier!r}; use Frozen() for no noise.")


def is_integer(perturbation: Perturbation) -> bool:
    """Whether a valid perturbation is of int8 parameters.

    Raises:
        ValueError: it is of int8 and of floating parameters.
    """
    specs = [spec for _, spec in check_perturbation(perturbation) if not isinstance(spec, Frozen)]
    integers = [isinstance(spec, Integer) for spec in specs]
    if any(integers) and not all(integers):
        raise ValueError("perturbation mixes Integer() with LowRank() or Dense(): int8 and floats cannot evolve together.")
    return any(integers)


def match_rules(perturbation: Perturbation, params: Any) -> list[Spec]:
    """Return the spec of every leaf, in leaf order.

    A leaf that is not a parameter follows the rules whose pattern matches no parameter, and is frozen where there is none.

    Raises:
        ValueError: a parameter without a rule, or a rule without a leaf.
    """
    rules, leaf_paths = check_perturbation(perturbation), paths(params)
    others = collections(params)
    parameters = [path for path, other in zip(leaf_paths, others, strict=True) if other is None]
    of_others = [not any(re.fullmatch(pattern, path) for path in parameters) for pattern, _ in rules]
    used, specs = set(), []
    for path, other in zip(leaf_paths, others, strict=True):
        matched = [i for i, (pattern, _) in enumerate(rules) if re.fullmatch(pattern, path)]
        if other is None and not matched:
            raise ValueError(f"no perturbation rule matches parameter '{path}'; end the list with ('.*', LowRank()).")
        used.update(matched[:1])
        if other is not None:
            matched = [i for i in matched if of_others[i]]
            used.update(matched[:1])
        specs.append(rules[matched[0]][1] if matched else Frozen())
    for i, (pattern, _) in enumerate(rules):
        if i not in used:
            raise ValueError(
                f"perturbation rule {pattern!r} matches no parameter that an earlier rule left; paths are "
                f"{', '.join(leaf_paths[:8])}{', ...' if len(leaf_paths) > 8 else ''}."
            )
    return specs


def trainable(params: Any, perturbation: Perturbation) -> Any:
    """A pytree like `params`: False where the leaf is frozen.

    Raises:
        ValueError: an unused rule, or a leaf without a rule.
    """
    specs = match_rules(perturbation, params)
    return jax.tree.unflatten(jax.tree.structure(params), [not isinstance(spec, Frozen) for spec in specs])
