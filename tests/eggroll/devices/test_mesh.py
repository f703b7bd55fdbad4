"""A generation over a mesh gives what one device gives; `mesh_runs` has the runs."""

import re

import jax
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

import eggroll
from tests.eggroll.devices import mesh_runs
from tests.tables import by_default

DEFAULT = [
    "population 8, chunks",
    "population 4, data 2, shard_optimizer",
    "population 2, data 2, model 2",
    "population 8, 11 pairs",
    "population 8, member state",
    "population 4, data 2, aux",
]

UNCHUNKED = ["population 1", "population 2", "population 4, explicit axes", "population 8, 11 pairs"]


@pytest.mark.parametrize("name", by_default(mesh_runs.EQUAL, *DEFAULT))
def test_a_mesh_gives_what_one_device_gives(name):
    found = mesh_runs.equal(name)
    assert found["fitness"] <= 1e-6
    assert max(found.values()) <= 1e-5, found


@pytest.mark.parametrize("name", by_default(UNCHUNKED, "population 8, 11 pairs"))
def test_the_fitness_of_an_unchunked_population_is_the_same_bit_for_bit(name):
    assert mesh_runs.equal(name)["fitness"] == 0.0


def test_padded_pairs_that_weigh_something_are_noticed():
    """The negative control of the comparison above."""
    assert mesh_runs.wrong_weights_of_padded_pairs()["update"] > 1e-2


@pytest.mark.slow
def test_int8_parameters_are_the_same_bits_on_any_number_of_devices():
    found = mesh_runs.integers()
    assert not found.pop("control") and len(found) == 4 and all(found.values()), found


@pytest.mark.slow
def test_replay_tell_apply_and_an_outer_jit_are_the_same_generation():
    found = mesh_runs.cut_and_repeated()
    assert found["replay"] and found["generation"] == 2
    assert found["told_fitness"] <= 1e-6 and found["applied"] <= 1e-5
    assert found["told"] <= 1e-5 and mesh_runs.placed()["jitted"] <= 1e-5


def test_nothing_recompiles_over_generations_sigma_and_replay():
    assert mesh_runs.cut_and_repeated()["programs"] == [1, 1]


def test_invalid_members_are_the_same_matter_as_on_one_device():
    assert mesh_runs.invalid() == {"invalid": 1, "skipped": [False, True], "kept": True}


def test_only_fitness_and_the_gradient_cross():
    found = mesh_runs.placed()
    assert found["bytes"] == found["expected_bytes"]


def test_a_sharded_optimizer_gathers_the_parameters_and_no_gradient_crosses():
    found = mesh_runs.placed()
    crossing, parameters = found["shared_bytes"], found["gradient_bytes"]
    assert "reduce-scatter" not in crossing and crossing["all-gather"] == parameters + 4 * 32
    assert crossing["all-reduce"] < 100  # norms and counts
    assert found["momentum"] == "P('population',)" and found["momentum_share"] == (8, 128)


def test_parameters_over_model_stay_there_and_are_never_gathered():
    found = mesh_runs.placed()
    assert found["model"] == ["P(None, 'model')"] * 2
    assert found["model_gather"] <= found["parameter"] // 8  # shares of factors, not of parameters
    assert found["model_reduce"] <= found["parameter"] // 2  # the gradient of a device's own columns
    assert found["model_update"] <= 1e-5 and found["model_fitness"] <= 1e-6


def test_member_state_lies_over_the_population():
    assert mesh_runs.placed()["memory"] == "P('population',)"


@pytest.mark.slow
def test_checkpoints_and_durable_runs_go_on_on_another_mesh():
    found = mesh_runs.restored()
    assert found["mesh"] == {"population": 2} and found["bits"] and found["went_on"] <= 1e-5
    assert found["durable"] and found["generation"] == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fewer pairs than devices", "population_size 14 has 7 pairs, fewer than the devices of mesh axis 'population', 8."),
        ("groups", "members_per_batch makes 4 groups, which the devices of mesh axis 'population', 8, do not divide."),
        ("examples", "batch leaves need examples along axis 0 in a multiple of the devices of mesh axis 'data', 8, got"),
        ("scalar leaf", "batch leaves need examples along axis 0"),
        ("vector of examples", "fitness and aux must be means over the examples"),
        ("member state over data", "member_state cannot be carried on a mesh with the axis 'data'"),
        ("integers over data", "mesh axis 'data' averages the fitness, which int8 parameters do not; use 'population' alone."),
        ("shard_optimizer with model", "shard_optimizer needs a mesh with the axis 'population' and without 'model'"),
    ],
)
def test_what_a_mesh_cannot_do_is_refused_by_a_clear_error(name, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        mesh_runs.ERRORS[name]()


def one_device(*names):
    return Mesh(np.array(jax.devices()[:1]).reshape([1] * len(names)), names)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(mesh="cpu"), TypeError, "mesh must be a jax.sharding.Mesh or None, got str"),
        (dict(mesh=8), TypeError, "mesh must be a jax.sharding.Mesh or None, got int"),
        (dict(mesh=one_device("devices")), ValueError, "mesh axes must be out of population, data, model, got 'devices'"),
        (dict(mesh=one_device("population", "batch")), ValueError, "mesh axes must be out of .* got 'population', 'batch'"),
        (dict(shard_optimizer=True), ValueError, "shard_optimizer needs a mesh with the axis 'population', got no mesh"),
        (dict(mesh=one_device("data"), shard_optimizer=True), ValueError, "shard_optimizer needs a mesh with the axis"),
    ],
)
def test_a_wrong_mesh_is_refused_when_called(options, error, message):
    with pytest.raises(error, match=message):
        eggroll.EvolutionStrategy(None, population_size=8, sigma=0.1, optimizer=optax.sgd(0.1), **options)
