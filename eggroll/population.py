"""The population: evaluate a one-member function for every perturbed member without building one.

    member (p, s):  theta + s sigma E_p        laid out as [P, 2], signs (+1, -1)

Noise is drawn once per pair; `vmap` runs over the two signs inside and over pairs outside; chunks of pairs run through
`lax.map`, so a population larger than memory is normal.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from eggroll import integer, noise
from eggroll.draws import draw, leaf_keys
from eggroll.hoisting import hoisted
from eggroll.interpret import apply_perturbed
from eggroll.perturbed import perturb
from eggroll.plan import LeafPlan, Plan
from eggroll.quantised import OffGrid, off_grid

SIGNS = (1.0, -1.0)


@dataclasses.dataclass(frozen=True)
class PopulationLayout:
    """How a population is laid out and run.

    Args:
        num_pairs: P; the population has N = 2 P members, member index 2 p for sign +1 and 2 p + 1 for sign -1.
        members_per_batch: None: one batch is shared by all; 1: the batch has a leading axis of N, one entry per member;
            g (even, dividing N): a leading axis of N / g, consecutive groups of g members share an entry; 2: one for a pair.
        chunk_pairs: evaluate this many pairs at a time; None: all at once.
        signs: of the members of a pair; (1.0,) for one-sided estimates, whose "pairs" have one member.
        same_key: all members get the same key, not one for every pair.
        apart: the two members of a pair are entries of their own, so that devices can share a pair: `num_pairs` counts
            entries, entry j being pair j // S with sign j % S of the S signs, and results have leading axes [entries, 1].
    """

    num_pairs: int
    members_per_batch: int | None = None
    chunk_pairs: int | None = None
    signs: tuple[float, ...] = SIGNS
    same_key: bool = False
    apart: bool = False

    @classmethod
    def of_members(cls, population_size: int, members_per_batch: int | None, chunk_size: int | None) -> "PopulationLayout":
        """Layout from counts of members.

        Raises:
            ValueError: a count is odd, too small, or does not divide the population.
        """
        if not _is_even(population_size):
            raise ValueError(f"population_size must be an even integer >= 2 (antithetic pairs), got {population_size!r}.")
        g = members_per_batch
        if g is not None and not (
            isinstance(g, numbers.Integral) and g >= 1 and (g == 1 or g % 2 == 0) and population_size % g == 0
        ):
            raise ValueError(
                f"members_per_batch must be None, 1 or even and divide population_size {population_size}, got {g!r}."
            )
        if chunk_size is not None and not (
            isinstance(chunk_size, numbers.Integral) and chunk_size >= 2 and chunk_size % 2 == 0
        ):
            raise ValueError(f"chunk_size must be an even integer >= 2 or None, got {chunk_size!r}.")
        return cls(population_size // 2, members_per_batch, None if chunk_size is None else chunk_size // 2)

    @property
    def population_size(self) -> int:
        """N = 2 P; P where estimates are one-sided."""
        return self.num_pairs if self.apart else len(self.signs) * self.num_pairs

    @property
    def is_chunked(self) -> bool:
        """Whether the pairs run in more than one chunk."""
        return self.chunk_pairs is not None and self.chunk_pairs < self.num_pairs

    def check_batch(self, batch: Any) -> None:
        """Raise ValueError unless every leaf of `batch` has the leading axis that `members_per_batch` asks for."""
        if self.members_per_batch is None:
            return
        expected = self.population_size // self.members_per_batch
        for leaf in jax.tree.leaves(batch):
            if jnp.ndim(leaf) == 0 or jnp.shape(leaf)[0] != expected:
                raise ValueError(
                    f"batch leaves need a leading axis of {expected} (population_size {self.population_size} / "
                    f"members_per_batch {self.members_per_batch}), got shape {jnp.shape(leaf)}."
                )

    def one_member(self, batch: Any) -> Any:
        """Abstract shapes of one member's share of a batch of arrays, scalars or shapes."""
        shapes = jax.eval_shape(lambda x: x, batch)
        drop = 0 if self.members_per_batch is None else 1
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[drop:], x.dtype), shapes)


def _is_even(count: Any) -> bool:
    return isinstance(count, numbers.Integral) and int(count) >= 2 and int(count) % 2 == 0


def member_params(
    plan: Plan,
    params: Any,
    pair_noise: list[Any],
    *,
    sign: Array,
    sigma: Array | None,
    lazy: bool = True,
    in_loop: bool = False,
) -> Any:
    """Parameters of one member: theta + sign sigma E.

    Args:
        plan: the plan.
        params: the parameters.
        pair_noise: per leaf, its noise from `draw_pair`, None when frozen.
        sign: +1 or -1, int32 for integer noise.
        sigma: standard deviation; None for integer noise, whose spec says it.
        lazy: keep leaves with factors as `PerturbedArray`; False builds them (the dense oracle), quantised ones as floats.
        in_loop: the member is evaluated inside a loop over chunks; only the form of sums depends on it.

    Returns:
        A pytree like `params`.
    """

    def member_leaf(planned, leaf, drawn):
        if planned.role == "frozen":
            return leaf
        if planned.integer:
            return _integer_leaf(planned, leaf, drawn, sign, lazy=lazy)
        amplitude = sign * sigma * planned.spec.sigma_multiplier
        if planned.role == "dense":
            once = leaf.ndim == 1 and (in_loop or planned.spec.distribution == "normal")
            total = _dense_sum(leaf, drawn, amplitude, once=once, dtype=planned.noise_dtype)
            return OffGrid(total, planned.path) if planned.quantised and lazy else total
        scale = amplitude / math.sqrt(planned.spec.rank)
        if not lazy:
            built = scale * built_noise(planned, drawn).astype(jnp.float32)
            return off_grid(leaf, built, planned.noise_dtype) if planned.quantised else leaf + built.astype(leaf.dtype)
        scale = jnp.broadcast_to(scale, planned.sizes(planned.stack))
        shared, factors = drawn if isinstance(drawn, Flipped) else (None, drawn)
        return perturb(leaf, factors, scale=scale, shared=shared, quantised=planned.converted, **planned.where)

    leaves = [member_leaf(*leaf) for leaf in zip(plan.leaves, jax.tree.leaves(params), pair_noise, strict=True)]
    return jax.tree.unflatten(plan.tree, leaves)


def _integer_leaf(planned: LeafPlan, leaf: Array, drawn: Any, sign: Array, *, lazy: bool) -> Any:
    assert planned.integer is not None
    if planned.role == "dense":
        return integer.saturated(leaf.astype(jnp.int32) + planned.integer.rounded(drawn.astype(jnp.int32) * sign))
    if not lazy:
        raise ValueError(
            f"int8 parameter '{planned.path}' of one member cannot be built: its perturbation is finer than an integer; "
            "use Population.apply."
        )
    scale = jnp.broadcast_to(sign, planned.sizes(planned.stack))
    return perturb(leaf, drawn, scale=scale, integer=planned.integer, **planned.where)


def _dense_sum(leaf: Array, drawn: Array, amplitude: Array, *, once: bool, dtype: Any) -> Array:
    """Leaf + amplitude * drawn, added in float32 and rounded to `dtype`.

    `once` writes it on CPU as the product [1, amplitude] [leaf; drawn], which XLA computes once per member; the plain sum, and
    the decoding of the noise with it, is fused into every use and repeated for every input of the member. That is dear for
    normal noise and inside a loop over chunks; it is cheap otherwise (measured, experiments/LOG.md).
    """
    wide, drawn = leaf.astype(jnp.float32), drawn.astype(jnp.float32)
    if not once or jax.default_backend() != "cpu":
        return (wide + amplitude * drawn).astype(dtype)
    weights = jnp.stack([jnp.ones_like(amplitude), amplitude])
    total = jnp.einsum("k,kn->n", weights, jnp.stack([wide, drawn]), precision=jax.lax.Precision.HIGHEST)
    return total.astype(dtype)


class Flipped(NamedTuple):
    """Noise of one pair for a leaf of role "flipout": U o (r s^T)."""

    shared: Array  # U, of the leaf's shape and dtype
    signs: noise.Factors  # r and s


def built_noise(planned: LeafPlan, drawn: noise.Factors | Flipped) -> Array:
    """sqrt(r) E of one leaf, built: left^T right in the leaf's own axis order, times what is shared."""
    if isinstance(drawn, Flipped):
        return drawn.shared * built_noise(planned, drawn.signs)
    left, right = drawn.unpacked(planned.noise_dtype)
    return from_matrix(planned, jnp.einsum("...rm,...rn->...mn", left, right))


def from_matrix(planned: LeafPlan, matrix: Array) -> Array:
    """Arrange [*stack, m, n], in any shape, as the leaf."""
    axes = [*planned.stack, *planned.rows, *planned.columns]
    return matrix.reshape(planned.sizes(axes)).transpose([axes.index(axis) for axis in range(len(axes))])


def draw_shared(plan: Plan, key: Array, generation: Array | int, *, first_index: Array | int = 0) -> list[Any]:
    """Noise that all pairs share, at the address of pair 0 under its own key: U of leaves of role "flipout", else None."""
    leaves = [dataclasses.replace(leaf, role="dense") for leaf in plan.leaves if leaf.role == "flipout"]
    if not leaves:
        return [None] * len(plan.leaves)
    drawn: list[Any] = draw(leaves, leaf_keys(leaves, noise.stream_key(key, 4), generation), 0, first_index=first_index)
    arranged = iter([from_matrix(*of_leaf) for of_leaf in zip(leaves, drawn, strict=True)])
    return [next(arranged) if leaf.role == "flipout" else None for leaf in plan.leaves]


def draw_pair(
    plan: Plan,
    key: Array,
    generation: Array | int,
    pair: Array | int,
    *,
    first_index: Array | int = 0,
    shared: list[Any] | None = None,
) -> list[Any]:
    """Noise of one pair for every leaf, None where frozen; `generation` is divided by `noise_reuse` already.

    `first_index` is the stack index of the first layer, not 0 where the plan is of one layer out of a stack. `shared` is from
    `draw_shared`, for a caller that draws it once for several chunks of pairs.
    """
    shared = draw_shared(plan, key, generation, first_index=first_index) if shared is None else shared
    perturbed = [leaf for leaf in plan.leaves if leaf.role != "frozen"]
    drawn = iter(draw(perturbed, leaf_keys(perturbed, key, generation), pair, first_index=first_index))
    own: list[Any] = [None if leaf.role == "frozen" else next(drawn) for leaf in plan.leaves]
    return [signs if u is None else Flipped(u, signs) for u, signs in zip(shared, own, strict=True)]


def evaluate(
    function: Callable,
    plan: Plan,
    params: Any,
    *,
    layout: PopulationLayout,
    noise_key: Array,
    noise_generation: Array,
    sigma: Array | None,
    evaluation_key: Array,
    batch: Any = None,
    member_state: Any = None,
    first_pair: Array | int = 0,
) -> Any:
    """Run `function` for every member of the population.

    Args:
        function: `function(params, batch, key, member_state) -> pytree`, one member.
        plan: the plan of `params`.
        params: unperturbed parameters.
        layout: how many pairs to evaluate, chunking and the sharing of the batch.
        noise_key: the run's key.
        noise_generation: int32, generation // noise_reuse.
        sigma: float32 scalar; None for integer noise.
        evaluation_key: split per pair, unless the layout has `same_key`; both members of a pair get the same key (common
            random numbers).
        batch: pytree, with a leading axis as `layout.members_per_batch` says.
        member_state: pytree with leading axes [P, 2], or None.
        first_pair: index in the population of the first pair of the layout; not 0 on a device that evaluates a part.

    Returns:
        The function's result with leading axes [P, 2], or [P, S] for S signs.
    """
    signs = jnp.asarray(layout.signs, jnp.int32 if plan.is_integer else jnp.float32)
    per_member = layout.members_per_batch == 1
    shared_batch = layout.members_per_batch is None
    shared = draw_shared(plan, noise_key, noise_generation)

    def evaluate_pair(inputs):
        index, own_batch, state = inputs
        pair, own_signs = first_pair + index, signs
        if layout.apart:
            pair, own_signs = pair // len(signs), signs[pair % len(signs)][None]
        pair_noise = draw_pair(plan, noise_key, noise_generation, pair, shared=shared)
        key = evaluation_key if layout.same_key else jax.random.fold_in(evaluation_key, pair)

        def evaluate_member(sign, member_batch, state):
            member = member_params(plan, params, pair_noise, sign=sign, sigma=sigma, in_loop=layout.is_chunked)
            return apply_perturbed(function, member, member_batch, key, state)

        if shared_batch:
            own_batch = batch
        elif not per_member:
            own_batch = jax.tree.map(lambda x: x[index // (layout.members_per_batch // 2)], batch)
        return jax.vmap(evaluate_member, in_axes=(0, 0 if per_member else None, 0))(own_signs, own_batch, state)

    by_pair = jax.tree.map(lambda x: x.reshape(-1, len(layout.signs), *x.shape[1:]), batch) if per_member else None
    inputs = (jnp.arange(layout.num_pairs, dtype=jnp.int32), by_pair, member_state)

    def evaluate_all(inputs):
        if layout.is_chunked:
            return jax.lax.map(evaluate_pair, inputs, batch_size=layout.chunk_pairs)
        return jax.vmap(evaluate_pair)(inputs)

    return hoisted(evaluate_all)(inputs)
