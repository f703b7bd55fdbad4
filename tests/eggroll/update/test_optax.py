"""Every transformation and wrapper of optax works, with the update that optax itself makes, or is refused by name."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import eggroll
from eggroll.devices import sharded
from tests.tables import by_default

PARAMS = {"b": jnp.full(4, 0.3), "s": jnp.float32(0.7), "w": jnp.ones((6, 4)) / 3}
MASK = {"b": False, "s": True, "w": True}
KEY = jax.random.key(1)
WITH_RATE = (  # optax.<name>(0.1)
    "adabelief adadelta adafactor adagrad adam adamax adamaxw adamw adan amsgrad fromage lamb lars lion nadam nadamw novograd "
    "optimistic_adam_v2 optimistic_gradient_descent radam rmsprop rprop sgd sign_sgd signum sm3 yogi adaptive_grad_clip "
    "add_decayed_weights clip clip_by_block_rms clip_by_global_norm ema scale scale_by_learning_rate trace acprop ademamix "
    "adopt cocob dadapt_adamw dog dowg galore madgrad momo momo_adam muon prodigy schedule_free_adamw schedule_free_sgd "
    "simplified_ademamix"
)
WITHOUT = (  # optax.<name>()
    "apply_every centralize identity keep_params_nonnegative normalize_by_update_norm polyak_sgd scale_by_adadelta "
    "scale_by_adam scale_by_adamax scale_by_adan scale_by_amsgrad scale_by_belief scale_by_distance_over_gradients "
    "scale_by_lbfgs scale_by_lion scale_by_novograd scale_by_optimistic_gradient scale_by_param_block_norm "
    "scale_by_param_block_rms scale_by_polyak scale_by_radam scale_by_rms scale_by_rss scale_by_sign scale_by_sm3 "
    "scale_by_stddev scale_by_trust_ratio scale_by_yogi set_to_zero zero_nans normalize reduce_on_plateau scale_by_acprop "
    "scale_by_ademamix scale_by_adopt scale_by_cocob scale_by_galore scale_by_simplified_ademamix"
)
INNER = optax.adam(0.1)


def even(step, **extra):
    return step % 2 == 0


OPTAX = {
    **{name: lambda make: make(0.1) for name in WITH_RATE.split()},
    **{name: lambda make: make() for name in WITHOUT.split()},
    "MultiSteps": lambda make: make(optax.chain(INNER, optax.contrib.reduce_on_plateau()), 2),
    "add_noise": lambda make: make(0.1, 0.5, key=KEY),
    "apply_if_finite": lambda make: make(INNER, 3),
    "chain": lambda make: make(INNER, optax.contrib.reduce_on_plateau(patience=1)),
    "conditionally_mask": lambda make: make(INNER, even),
    "conditionally_transform": lambda make: make(INNER, even),
    "flatten": lambda make: make(INNER),
    "freeze": lambda make: make(MASK),
    "inject_hyperparams": lambda make: make(optax.adam)(0.1),
    "inject_stateful_hyperparams": lambda make: make(optax.adam)(0.1),
    "lbfgs": lambda make: make(0.1, linesearch=None),
    "masked": lambda make: make(INNER, MASK),
    "mechanize": lambda make: make(INNER),
    "multi_transform": lambda make: make({True: INNER, False: optax.sgd(0.1)}, MASK),
    "named_chain": lambda make: make(("first", INNER), ("second", optax.contrib.reduce_on_plateau())),
    "noisy_sgd": lambda make: make(0.1, key=KEY),
    "optimistic_adam": lambda make: make(0.1),
    "partition": lambda make: make({True: INNER, False: optax.set_to_zero()}, MASK),
    "sam": lambda make: make(optax.sgd(0.1), optax.chain(optax.contrib.normalize(), optax.sgd(0.05))),
    "scale_by_madgrad": lambda make: make(0.1),
    "scale_by_muon": lambda make: make(weight_dimension_numbers={"w": optax.contrib.MuonDimensionNumbers()}),
    "scale_by_rprop": lambda make: make(0.1),
    "scale_by_schedule": lambda make: make(optax.cosine_decay_schedule(0.1, 10)),
    "schedule_free": lambda make: make(INNER, 0.1),
    "selective_transform": lambda make: make(INNER, freeze_mask=MASK),
    "snapshot": lambda make: make("norm", optax.tree.norm),
    "split_real_and_imaginary": lambda make: make(INNER),
    "stateless": lambda make: make(lambda updates, params: jax.tree.map(jnp.sign, updates)),
    "stateless_with_tree_map": lambda make: make(lambda update, param: 0.1 * update),
    "with_extra_args_support": lambda make: make(INNER),
}
MATRICES = ("sm3", "scale_by_sm3", "scale_by_muon", "scale_by_distance_over_gradients")  # they take no scalars, or only these
REFUSED = {  # name: (how it is made, what it is told)
    "lookahead": (lambda make: make(INNER, 3, 0.5), "optimizer lookahead cannot be used: .* no attribute 'fast'"),
    "lbfgs": (lambda make: make(), r"scale_by_zoom_linesearch.* missing .* 'grad' and 'value_fn'.* no function to evaluate"),
    "scale_by_zoom_linesearch": (lambda make: make(5), "scale_by_zoom_linesearch.* missing .* 'value_fn'"),
    "scale_by_backtracking_linesearch": (lambda make: make(5), "scale_by_backtracking_linesearch.* 'value_fn'"),
    "sophia": (lambda make: make(0.1), "optimizer hutchinson_estimator_diag_hessian cannot be used: .* obj_fn"),
    "hutchinson_estimator_diag_hessian": (lambda make: make(), "optimizer hutchinson_.* cannot be used: .* obj_fn"),
    "sm3": (lambda make: make(0.1), "optimizer scale_by_sm3 cannot be used: .* list index out of range"),
    "measure_with_ema": (lambda make: make(optax.tree.norm, 0.9), "an update of another structure or other shapes"),
    "monitor": (lambda make: make({"norm": optax.tree.norm}), "optimizer monitor cannot be used: .* a state of another struct"),
    "scale_by_distance_over_gradients": (lambda make: make(), "over_gradients .* an update of another structure"),
    "sam": (lambda make: make(INNER, INNER, opaque_mode=True), "optimizer sam cannot be used: .* grad_fn"),
    "dpsgd": (lambda make: make(0.1, 1.0, 0.1, seed=0), "differentially_private_aggregate .* no gradients of examples"),
    "differentially_private_aggregate": (lambda make: make(1.0, 0.1, KEY), "differentially_private_aggregate .* of examples"),
}


def maker(name):
    return getattr(optax.contrib, name, None) or getattr(optax, name)


def fitness(params, batch, key):
    return -jnp.mean((batch @ params["w"] * params.get("s", 1.0) + params.get("b", 0.0)) ** 2)


BATCH = jnp.arange(30.0).reshape(5, 6) / 30


def start(optimizer, params=PARAMS):
    es = eggroll.EvolutionStrategy(fitness, population_size=8, sigma=0.1, optimizer=optimizer)
    return es, es.init(params, key=jax.random.key(0))


def test_the_table_has_all_of_optax():
    for module in (optax, optax.contrib):
        for name, function in inspect.getmembers(module, callable):
            returns = getattr(function, "__annotations__", {}).get("return")
            makes = inspect.isclass(returns) and issubclass(returns, optax.GradientTransformation)
            assert not makes or name[0] == "_" or name in OPTAX or name in REFUSED, f"{name} is in no table"


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", list(REFUSED))
def test_what_does_not_fit_is_refused_by_name(name, standard_promotion):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        es, state = start(make(maker(name)))
        es.plan(state, BATCH)


SOME = "chain sam"


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", by_default(list(OPTAX), *SOME.split()))
def test_two_generations_are_those_of_optax(name, standard_promotion):
    optimizer, params = OPTAX[name](maker(name)), {"w": PARAMS["w"]} if name in MATRICES else PARAMS
    es, state = start(optimizer, params)
    takes = inspect.signature(optimizer.update).parameters.values()
    takes_value = any(one.name == "value" or one.kind is one.VAR_KEYWORD for one in takes)
    opt_state = optimizer.init(params)
    for generation in range(2):
        before = eggroll.copy_state(state)
        state, metrics = es.step(state, BATCH)
        ascent = sharded.gradient(
            es.plan(state), metrics.coefficients, placement=None, noise_key=state.key, noise_generation=generation, sigma=0.1
        )
        value = {"value": -metrics.mean_fitness} if takes_value else {}
        updates, opt_state = optimizer.update(jax.tree.map(jnp.negative, ascent), opt_state, params, **value)
        params = optax.apply_updates(params, updates)
        for got, known in zip(*map(jax.tree.leaves, ((state.params, state.opt_state), (params, opt_state))), strict=True):
            np.testing.assert_allclose(plain(got), plain(known), rtol=1e-4, atol=1e-5)
        again = es.replay(before, metrics.coefficients, mean_fitness=float(metrics.mean_fitness))
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(plain(a), plain(b)), again, state)


def plain(leaf):
    return jax.random.key_data(leaf) if jnp.issubdtype(jnp.asarray(leaf).dtype, jax.dtypes.prng_key) else np.asarray(leaf)


@pytest.mark.parametrize("sign", [1.0, pytest.param(-1.0, id="control")])
def test_value_is_minus_the_mean_fitness(sign, standard_promotion):
    """A plateau is seen in the fitness: the rate falls when it stays, and does not when it rises."""
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=2, rtol=0.0, atol=1e-6)
    es = eggroll.EvolutionStrategy(
        lambda params, batch, key: sign * batch + 1e-3 * params["w"].sum(),
        population_size=4,
        sigma=0.1,
        optimizer=optax.chain(optax.sgd(1e-6), plateau),
    )
    state = es.init({"w": jnp.ones((2, 3))}, key=jax.random.key(0))
    for generation in range(6):
        state, _ = es.step(state, jnp.float32(generation))
    assert float(state.opt_state[1].scale) == (1.0 if sign == 1 else 0.25)


def test_replay_needs_the_mean_fitness_of_an_optimizer_that_reads_it(standard_promotion):
    es, state = start(optax.polyak_sgd())
    before = eggroll.copy_state(state)
    _, metrics = es.step(state, BATCH)
    with pytest.raises(ValueError, match=r"scale_by_polyak.* missing .* 'value'.* \(replay needs mean_fitness for it\)"):
        es.replay(before, metrics.coefficients)


def test_an_update_of_other_shapes_is_refused():
    wrong = optax.stateless(lambda updates, params: jax.tree.map(lambda leaf: leaf[None], updates))
    es, state = start(wrong)
    with pytest.raises(ValueError, match="it returned an update of another structure or other shapes"):
        es.step(state, BATCH)
