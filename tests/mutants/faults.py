"""One-line faults that the default suite has to notice, and the tests that are tried first."""

from typing import NamedTuple


class Fault(NamedTuple):
    """`line`, which `path` has exactly once, becomes `broken`."""

    name: str
    path: str
    line: str
    broken: str
    tests: tuple[str, ...]


NOISE = "tests/eggroll/noise/test_noise.py"
INTEGER = "tests/eggroll/noise/test_integer.py"
LAZY = "tests/eggroll/lazy/test_perturbed.py"
POPULATION = "tests/eggroll/population"
ESTIMATOR = "tests/eggroll/update/test_estimator.py"
CHECKSUMS = "tests/eggroll/update/test_checksums.py"
HAND_CHANGES = "tests/eggroll/journal/test_hand_changes.py"
SHAPING = "tests/eggroll/update/test_shaping.py"
REGIONS = "tests/eggroll/noise/test_regions.py"
BLOCKS = "tests/eggroll/update/test_blocks.py"
SPLITTING = "tests/eggroll/update/test_splitting.py"
PRECISION = "tests/eggroll/update/test_precision.py"
PROGRAMS = "tests/eggroll/test_programs.py"
STRATEGY = "tests/eggroll/test_strategy.py"
MESH = "tests/eggroll/devices/test_mesh.py"
JOURNAL = "tests/eggroll/journal"
DURABLE = "tests/eggroll/runs/test_durable.py"
ZO = "tests/zo/test_zo.py"
OFFLOAD = "tests/zo/test_offload.py"
KERNELS = "tests/kernels/test_kernels.py"
OPTAX = "tests/eggroll/update/test_optax.py"
BUILT = "tests/eggroll/lazy/test_built.py"
LOCK = "tests/eggroll/runs/test_lock.py"
COLLECTIONS = "tests/eggroll/noise/test_collections.py"
REWARDS = "tests/envs/test_reward_calls.py"

FAULTS = (
    Fault(
        "layers of a stack share their noise",
        "eggroll/noise/addresses.py",
        "requests.append((jnp.broadcast_to(key, (*stack, 2)), pair, index))",
        "requests.append((jnp.broadcast_to(key, (*stack, 2)), pair, index * 0))",
        (NOISE,),
    ),
    Fault(
        "parameters share their noise",
        "eggroll/noise/addresses.py",
        "hashes = [hashlib.sha256(path.encode()).digest() for path in paths]",
        'hashes = [hashlib.sha256(b"").digest() for path in paths]',
        (NOISE, ESTIMATOR),
    ),
    Fault(
        "pairs share their noise",
        "eggroll/noise/addresses.py",
        "requests.append((jnp.broadcast_to(key, (*stack, 2)), pair, index))",
        "requests.append((jnp.broadcast_to(key, (*stack, 2)), pair * 0, index))",
        (NOISE,),
    ),
    Fault(
        "generations share their noise",
        "eggroll/noise/addresses.py",
        "generation_key = _threefry([(jax.random.key_data(key), 0, generation)])[0]",
        "generation_key = _threefry([(jax.random.key_data(key), 0, generation * 0)])[0]",
        (NOISE,),
    ),
    Fault(
        "normal noise lacks sqrt(2)",
        "eggroll/noise/addresses.py",
        "values = math.sqrt(2.0) * jax.lax.erf_inv(uniform)",
        "values = jax.lax.erf_inv(uniform)",
        (NOISE,),
    ),
    Fault(
        "factors swapped",
        "eggroll/noise/addresses.py",
        "return _by_rank(values[..., : rank * m], rank), _by_rank(values[..., rank * m :], rank)",
        "return _by_rank(values[..., rank * n :], rank), _by_rank(values[..., : rank * n], rank)",
        (NOISE, LAZY),
    ),
    Fault(
        "members lack 1 / sqrt(r)",
        "eggroll/population/members.py",
        "scale = amplitude / math.sqrt(planned.rank)",
        "scale = amplitude",
        (POPULATION, ESTIMATOR),
    ),
    Fault(
        "gradient lacks 1 / sqrt(r)",
        "eggroll/update/estimator.py",
        "total = from_matrix(leaf, total / math.sqrt(leaf.rank))",
        "total = from_matrix(leaf, total)",
        (ESTIMATOR,),
    ),
    Fault(
        "gradient lacks 1 / sigma",
        "eggroll/update/estimator.py",
        "return total / (members * leaf_sigma)",
        "return total / members",
        (ESTIMATOR,),
    ),
    Fault(
        "a pair's members have one sign",
        "eggroll/population/layout.py",
        "SIGNS = (1.0, -1.0)",
        "SIGNS = (1.0, 1.0)",
        (POPULATION, ESTIMATOR),
    ),
    Fault(
        "pairs folded with the wrong sign",
        "eggroll/update/estimator.py",
        "return pairs[:, 0] - pairs[:, 1]",
        "return pairs[:, 1] - pairs[:, 0]",
        (ESTIMATOR,),
    ),
    Fault(
        "pairs off by one",
        "eggroll/update/pair_sums.py",
        "pairs = first_pair + start + jnp.arange(chunk, dtype=jnp.int32)",
        "pairs = first_pair + start + 1 + jnp.arange(chunk, dtype=jnp.int32)",
        (ESTIMATOR,),
    ),
    Fault(
        "the last chunk of pairs is dropped",
        "eggroll/update/pair_sums.py",
        "if for_all < num_pairs:",
        "if for_all < 0:",
        (ESTIMATOR,),
    ),
    Fault(
        "optimizer ascends the loss",
        "eggroll/update/parameters.py",
        "*update.of_leaf(index, place, -ascent, old.param, old.moments)",
        "*update.of_leaf(index, place, ascent, old.param, old.moments)",
        (STRATEGY,),
    ),
    Fault(
        "parts of the gradient are not summed over devices",
        "eggroll/devices/pieces.py",
        "join=(lambda total: jax.lax.psum(total, pair_axes)) if pair_axes else Part.join,",
        "join=Part.join,",
        (MESH,),
    ),
    Fault(
        "a device's piece has the noise of the first piece",
        "eggroll/devices/pieces.py",
        "origins=tuple(origins),",
        "origins=tuple((0,) * len(origin) for origin in origins),",
        (MESH,),
    ),
    Fault(
        "blocks of all layers have the noise of the first layers",
        "eggroll/noise/regions.py",
        "along = jnp.asarray(region.starts[axis]).astype(jnp.uint32) + jnp.arange(region.sizes[axis], dtype=jnp.uint32)",
        "along = jnp.arange(region.sizes[axis], dtype=jnp.uint32)",
        (REGIONS,),
    ),
    Fault(
        "an optimizer that mixes parameters is split",
        "eggroll/update/splitting.py",
        "self.mixed = len(set(roots)) < len(roots)",
        "self.mixed = False",
        (SPLITTING,),
    ),
    Fault(
        "an update that needs all of a parameter is applied to blocks",
        "eggroll/update/splitting.py",
        "elementwise = fits and (name in ELEMENTWISE",
        "elementwise = True or (name in ELEMENTWISE",
        (SPLITTING,),
    ),
    Fault(
        "a function of all of a parameter is evaluated in blocks",
        "eggroll/update/splitting.py",
        "equation.primitive is per_block_p and len(own) == 1 and own[0][1] is equation.invars[0]",
        "equation.primitive is per_block_p",
        (SPLITTING,),
    ),
    Fault(
        "factors of a block of layers are those of the first layers",
        "eggroll/noise/regions.py",
        "layers = [(region.starts[axis], region.sizes[axis]) for axis in leaf.stack]",
        "layers = [(0, region.sizes[axis]) for axis in leaf.stack]",
        (REGIONS,),
    ),
    Fault(
        "a checksum that does not see places",
        "eggroll/update/checksums.py",
        "place = place * jnp.uint32(_STEP)",
        "place = jnp.zeros_like(place)",
        (CHECKSUMS,),
    ),
    Fault(
        "a change by hand that is not compared",
        "eggroll/runs/continuity.py",
        "compare(self._names, self._expected, before)",
        "compare(self._names, before, before)",
        (HAND_CHANGES,),
    ),
    Fault(
        "a block that is not finite is stored",
        "eggroll/update/blocks.py",
        "stays = ~finite if rules.skipped is None else ~finite | rules.skipped",
        "stays = ~finite & finite if rules.skipped is None else rules.skipped",
        (BLOCKS,),
    ),
    Fault(
        "the state shares its memory with the caller's parameters",
        "eggroll/generation.py",
        "params = jax.tree.map(jnp.asarray, params) if donate else copy_state(params)",
        "params = jax.tree.map(jnp.asarray, params)",
        (BLOCKS,),
    ),
    Fault(
        "rounding has the same random bits in every layer",
        "eggroll/update/precision.py",
        "high, low = (along[0] if along else jnp.uint32(0)), jnp.zeros(tuple(sizes), jnp.uint32)",
        "high, low = jnp.uint32(0), jnp.zeros(tuple(sizes), jnp.uint32)",
        (PRECISION,),
    ),
    Fault(
        "every device evaluates the first pairs",
        "eggroll/devices/sharded.py",
        "first_pairs = local.num_pairs * jnp.arange(devices, dtype=jnp.int32)",
        "first_pairs = 0 * jnp.arange(devices, dtype=jnp.int32)",
        (MESH,),
    ),
    Fault(
        "ranks do not share ties",
        "eggroll/update/shaping.py",
        "return (below + not_above - 1.0) / (2.0 * (column.shape[0] - 1)) - 0.5",
        "return below / (column.shape[0] - 1) - 0.5",
        (SHAPING,),
    ),
    Fault(
        "NaN counts as best",
        "eggroll/update/shaping.py",
        "worst = jnp.min(jnp.where(finite, fitness, jnp.inf), axis=0, keepdims=True)",
        "worst = jnp.max(jnp.where(finite, fitness, -jnp.inf), axis=0, keepdims=True)",
        (SHAPING,),
    ),
    Fault(
        "z-score over the wrong axis",
        "eggroll/update/shaping.py",
        "return (fitness - fitness.mean(axis=0)) / (fitness.std(axis=0) + 1e-8)",
        "return (fitness - fitness.mean(axis=1, keepdims=True)) / (fitness.std(axis=0) + 1e-8)",
        (SHAPING,),
    ),
    Fault(
        "stochastic rounding is biased",
        "eggroll/update/precision.py",
        "up = uniform < value / ulp - whole",
        "up = uniform > value / ulp - whole",
        (PRECISION,),
    ),
    Fault(
        "int8 weights do not saturate",
        "eggroll/noise/integer.py",
        "return jnp.clip(total, -LARGEST, LARGEST).astype(jnp.int8)",
        "return total.astype(jnp.int8)",
        (INTEGER,),
    ),
    Fault(
        "integer noise is rounded down",
        "eggroll/noise/integer.py",
        "return total if shift == 0 else (total + (1 << (shift - 1)) + (total >> 31)) >> shift",
        "return total >> shift",
        (INTEGER,),
    ),
    Fault(
        "the low-rank product drops its scale",
        "kernels/lowrank_dot/reference.py",
        "hidden *= _aligned(scale.astype(hidden.dtype)[..., None], [*scale_axes], kept)",
        "hidden *= _aligned(jnp.ones_like(scale).astype(hidden.dtype)[..., None], [*scale_axes], kept)",
        (LAZY,),
    ),
    Fault(
        "the update is transposed",
        "eggroll/update/pair_sums.py",
        'return jnp.einsum("...mk,...kn->...mn", left * weights, right, precision=jax.lax.Precision.HIGHEST)',
        'return jnp.einsum("...mk,...kn->...nm", left * weights, right, precision=jax.lax.Precision.HIGHEST)',
        (ESTIMATOR,),
    ),
    Fault(
        "the specification of the kernel of the update is transposed",
        "kernels/lowrank_update/reference.py",
        'return jnp.einsum("...km,...kn->...mn", left, right, precision=jax.lax.Precision.HIGHEST)',
        'return jnp.einsum("...km,...kn->...nm", left, right, precision=jax.lax.Precision.HIGHEST)',
        ("tests/kernels/test_kernels.py",),
    ),
    Fault(
        "a one-sided difference lacks its factor 2",
        "zo/estimators.py",
        "return 2 * (plus - other)",
        "return plus - other",
        (ZO,),
    ),
    Fault(
        "directions without a finite loss are not made up for",
        "zo/estimators.py",
        "d * share, 0.0)",
        "d, 0.0)",
        (ZO,),
    ),
    Fault(
        "replay skips the first generation of a journal",
        "eggroll/journal/replay.py",
        "if entry.generation < reached:",
        "if entry.generation <= reached:",
        (JOURNAL, DURABLE),
    ),
    Fault(
        "a batch of the wrong length is accepted",
        "eggroll/population/layout.py",
        "if jnp.ndim(leaf) == 0 or jnp.shape(leaf)[0] != expected:",
        "if jnp.ndim(leaf) == 0:",
        (STRATEGY, POPULATION),
    ),
    Fault(
        "the chunk of the first batch is kept for all (stale chunk)",
        "eggroll/strategy.py",
        'key = "layout", self, function, programs.signature((state, batch))',
        'key = "layout", self, function, programs.signature(state)',
        (PROGRAMS,),
    ),
    Fault(
        "plans are dropped like programs",
        "eggroll/programs.py",
        'alike = [other for other in _entries if (other[0] == "plan") == kind_is_plan]',
        "alike = list(_entries)",
        (PROGRAMS,),
    ),
    Fault(
        "a function with another plan is accepted",
        "eggroll/plans.py",
        "planned.check_uses(own)",
        "pass",
        (PROGRAMS,),
    ),
    Fault(
        "a checkpoint is not compared with its fingerprint",
        "eggroll/journal/checkpoint.py",
        'if fingerprint(stored) != restored["check"]["all"]:',
        "if not stored:",
        (JOURNAL,),
    ),
    Fault(
        "an optimizer gets the mean fitness for its loss",
        "eggroll/generation.py",
        "value = None if mean is None else -mean",
        "value = mean",
        (OPTAX,),
    ),
    Fault(
        "members build a parameter without its perturbation",
        "eggroll/lazy/low_rank.py",
        "return (value.base.astype(wide) + term).astype(value.base.dtype)",
        "return value.base",
        (BUILT,),
    ),
    Fault(
        "a learnt number is lost",
        "eggroll/lazy/scaled.py",
        "    return Scaled(value, gain)\n",
        "    return Scaled(value, jnp.ones_like(gain))\n",
        (BUILT,),
    ),
    Fault(
        "a run has two writers",
        "eggroll/journal/lock.py",
        "fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "pass",
        (LOCK,),
    ),
    Fault(
        "a run resumes as another run",
        "eggroll/journal/header.py",
        "different = [name for name, old, new in known if name in compared and old != new and old and new]",
        "different: list[str] = []",
        (JOURNAL,),
    ),
    Fault(
        "statistics of a model are perturbed",
        "eggroll/noise/rules.py",
        "matched = [i for i in matched if of_others[i]]",
        "pass",
        (COLLECTIONS,),
    ),
    Fault(
        "a failed reward scores more than a wrong answer",
        "envs/tasks/scoring.py",
        "minimum = min([self._minimum, *(own for own in outcomes if isinstance(own, float) and not math.isnan(own))])",
        "minimum = self._minimum",
        (REWARDS,),
    ),
    Fault(
        "a reward changes the lists of others",
        "envs/tasks/calls.py",
        "_copy(list(entries)) for name, entries",
        "entries for name, entries",
        (REWARDS,),
    ),
)
