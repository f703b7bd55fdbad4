"""Every strategy has what the protocol asks for; mypy checks the types, in the modules of the strategies."""

import inspect

import jax
import jax.numpy as jnp
import optax
import pytest

import eggroll
from eggroll import zo
from eggroll.protocol import AskTell, State, Strategy
from tests.zo.tiny_blocks import BATCH, PIECES, init

KEY = jax.random.key(0)
PARAMS = {"w": jnp.ones((2, 2))}


def evolution(fitness=None):
    return eggroll.EvolutionStrategy(fitness, population_size=4, sigma=0.1, optimizer=optax.sgd(0.1))


def members(protocol):
    """Names that a protocol declares, those of its base included."""
    own = [vars(base) for base in protocol.__mro__ if base in (State, Strategy, AskTell)]
    return {name for names in own for name in names if not name.startswith(("__", "_abc", "_is_"))}


STRATEGIES = {
    "EvolutionStrategy": (evolution(), PARAMS),
    "External": (eggroll.External(evolution(), lambda params, x: x, lambda outputs, known: 0.0), PARAMS),
    "ZerothOrder": (zo.mezo(PIECES, learning_rate=0.1), init()),
    "Offload": (zo.Offload(zo.mezo(PIECES, learning_rate=0.1)), init()),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_and_its_state_have_what_the_protocol_declares(name):
    es, params = STRATEGIES[name]
    state = es.init(params, key=KEY)
    for protocol, value in ((Strategy, es), (State, state)):
        assert not {member for member in members(protocol) if not hasattr(value, member)}
    for method in ("plan", "step", "replay", "parameters"):
        wanted = list(inspect.signature(getattr(Strategy, method)).parameters)[1:]
        assert list(inspect.signature(getattr(es, method)).parameters)[: len(wanted)] == wanted
    assert state._replace(generation=jnp.int32(3)).generation == 3 and "generation" in state._asdict()
    jax.tree.map(lambda own, given: own.shape == given.shape or pytest.fail(f"{own.shape}"), es.parameters(state), params)


def test_ask_and_tell_are_a_protocol_of_their_own():
    assert {"ask", "tell"} <= members(AskTell) and not {"ask", "tell"} & members(Strategy)
    assert not {name for name in members(AskTell) if not hasattr(evolution(), name)}
    tuner = zo.mezo(PIECES, learning_rate=0.1)
    assert {name for name in members(AskTell) if not hasattr(tuner, name)} == {
        "ask",
        "tell",
        "fitness",
        "on_one_device",
    }  # control
    assert tuner.step(tuner.init(init(), key=KEY), BATCH)[1].coefficients.shape == (tuner.population_size // 2,)
