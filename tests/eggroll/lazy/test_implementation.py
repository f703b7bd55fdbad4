"""The engine's choice between plain JAX and kernels: in the plan, in messages, and in the program that a GPU gets.

`test_kernels.py` runs whole generations by the kernels, interpreted.
"""

import jax
import jax.numpy as jnp
import optax
import pytest

import eggroll
from eggroll.kernels import hopper
from eggroll.llm.decoder import apply
from eggroll.llm.models.leaves import init
from eggroll.llm.models.transformer import TransformerConfig, leaves, make_decoder
from eggroll.noise.factored import LowRankLeaf
from tests.kernels import kernel_models

gpu_interpreter = pytest.importorskip("tests.kernels.gpu_interpreter", reason="this jax has no GPU interpreter of this form")


@pytest.fixture
def on_hopper(monkeypatch):
    """Let kernels be traced here."""
    monkeypatch.setattr(hopper, "check_device", lambda: None)
    monkeypatch.setattr(hopper, "programs", lambda: 2)


def kernels_of(plan) -> dict[str, str]:
    return {leaf.path: leaf.implementation for leaf in plan.leaves if isinstance(leaf, LowRankLeaf)}


def plan_of(es, params, batch):
    return es.plan(es.init(params, key=jax.random.key(1)), batch)


def calls(es, params, batch) -> int:
    """Kernels in the program of a step."""
    state = es.init(params, key=jax.random.key(1))
    es.plan(state, batch)
    text = gpu_interpreter.lowered_for_cuda(lambda state, batch: es.step(state, batch), state, batch)
    return text.count("@mosaic_gpu")


def test_reference_where_there_is_no_gpu():
    plan = plan_of(kernel_models.strategy(None), kernel_models.params(), kernel_models.batch())
    assert set(kernels_of(plan).values()) == {"reference"}


def test_plan_says_which_parameters_have_a_kernel(on_hopper):
    plan = plan_of(kernel_models.strategy(None), kernel_models.params(), kernel_models.batch())
    expected = dict(first="mosaic_gpu", stack="mosaic_gpu", head="mosaic_gpu")
    assert kernels_of(plan) == expected
    header, *rows = (line.split() for line in plan.table().splitlines())
    assert "kernel" in header and all("mosaic_gpu" in row for row in rows if row[0] == "first")


@pytest.mark.slow
def test_step_of_floats_is_lowered_with_kernels(on_hopper):
    operands = kernel_models.params(), kernel_models.batch()
    # stack (in a scan) and head forward; first, stack and head in the update: the first product has inputs that members share
    assert calls(kernel_models.strategy("mosaic_gpu"), *operands) == 5
    assert calls(kernel_models.strategy("mosaic_gpu", rank=4, distribution="normal"), *operands) == 5
    assert calls(kernel_models.strategy("reference"), *operands) == 0


@pytest.mark.slow
def test_every_projection_of_a_language_model_has_a_kernel(on_hopper):
    config = TransformerConfig(256, 128, 256, 2, 4, 2, 32, model_type="llama", tie_word_embeddings=True)
    model, params = make_decoder(config), init(leaves(config), jax.random.key(0), jnp.bfloat16)
    texts = jax.random.randint(jax.random.key(1), (64, 1, 2), 0, 256)

    def fitness(params, text, key):
        return apply(model, params, text, jnp.ones(text.shape, bool)).astype(jnp.float32).mean()

    options = dict(population_size=64, members_per_batch=1, sigma=1e-3, optimizer=optax.sgd(1e-3))
    es = eggroll.EvolutionStrategy(fitness, **options, perturbation=eggroll.LowRank())
    # Forward q, k, v, o, gate, up, down, in one scan over the layers; the update of these and of the tied embedding.
    assert calls(es, params, texts) == 7 + 8


@pytest.mark.slow
def test_step_of_integers_is_lowered_with_kernels(on_hopper):
    operands = kernel_models.integer_params(), kernel_models.integer_batch()
    assert calls(kernel_models.integer_strategy("mosaic_gpu"), *operands) == 1
    assert calls(kernel_models.integer_strategy("reference"), *operands) == 0


def test_kernel_needs_a_gpu():
    if jax.default_backend() != "gpu":
        with pytest.raises(NotImplementedError, match="needs a GPU, the default backend is cpu"):
            plan_of(kernel_models.strategy("mosaic_gpu"), kernel_models.params(), kernel_models.batch())


@pytest.mark.parametrize(
    ("shape", "dtype", "transposed", "message"),
    [
        ((128, 128), jnp.float32, False, r"'w' is float32 \[128, 128\] with rank 1"),
        ((96, 128), jnp.bfloat16, False, r"'w' is bfloat16 \[96, 128\]"),
        ((128, 128), jnp.bfloat16, True, "axis 1 x axis 0"),
    ],
)
def test_named_kernel_says_what_it_does_not_cover(shape, dtype, transposed, message, on_hopper):
    def fitness(params, batch, key):
        w = params["w"]
        return jnp.mean((batch @ (w.T if transposed else w)).astype(jnp.float32))

    params, batch = {"w": jnp.zeros(shape, dtype)}, jnp.zeros((4, shape[1] if transposed else shape[0]), dtype)
    options = dict(optimizer=optax.sgd(0.1), population_size=4, sigma=0.1)
    es = eggroll.EvolutionStrategy(fitness, perturbation=eggroll.LowRank(implementation="mosaic_gpu"), **options)
    with pytest.raises(NotImplementedError, match=message):
        plan_of(es, params, batch)
    es = eggroll.EvolutionStrategy(fitness, perturbation=eggroll.LowRank(), **options)
    assert kernels_of(plan_of(es, params, batch)) == {"w": "reference"}


def test_unknown_implementation_is_an_error():
    with pytest.raises(ValueError, match="must be None or one of reference, mosaic_gpu, got 'triton'"):
        kernel_models.strategy("triton")
