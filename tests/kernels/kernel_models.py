"""Small models whose products have kernels, and one generation of them."""

import jax
import jax.numpy as jnp
import optax

import eggroll

BF16 = jnp.bfloat16


def params() -> dict:
    """A matrix, two stacked ones and a head."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"first": (128, 128), "stack": (2, 128, 128), "head": (128, 64)}
    drawn = {name: jax.random.normal(key, shapes[name], BF16) / 11 for name, key in zip(shapes, keys, strict=True)}
    return drawn | {"bias": jnp.zeros(128, BF16)}


def fitness(params, batch, key):
    x, y = batch
    h, _ = jax.lax.scan(
        lambda h, w: (jax.nn.relu(h @ w), None), jax.nn.relu(x @ params["first"] + params["bias"]), params["stack"]
    )
    return -jnp.mean(jnp.square((h @ params["head"] - y).astype(jnp.float32)))


def batch() -> tuple:
    """Inputs that all members share: the first product is the reference's."""
    return jax.random.normal(jax.random.key(3), (4, 128), BF16), jax.random.normal(jax.random.key(4), (4, 64), BF16)


def strategy(implementation: str | None, **options) -> eggroll.EvolutionStrategy:
    perturbation = eggroll.LowRank(implementation=implementation, **options)
    return eggroll.EvolutionStrategy(
        fitness, optimizer=optax.sgd(0.1), population_size=64, sigma=0.1, shaping=lambda raw: raw, perturbation=perturbation
    )


def generation(implementation: str | None, *, seed: int = 1) -> tuple:
    """Fitness [N] and the step, float32."""
    es, start = strategy(implementation), params()
    state, metrics = es.step(es.init(start, key=jax.random.key(seed)), batch())
    return metrics.fitness, jax.tree.map(lambda new, old: (new - old).astype(jnp.float32), state.params, start)


def integer_fitness(params, batch, key):
    x, y = batch
    h = jnp.clip(_product(x, params["first"]) >> 9, -127, 127).astype(jnp.int8)
    return -jnp.abs((_product(h, params["head"]) >> 9) - y).sum()


def _product(x, w):
    return jax.lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)


def integer_strategy(implementation: str | None) -> eggroll.EvolutionStrategy:
    perturbation = eggroll.Integer(shift=2, implementation=implementation)
    return eggroll.EvolutionStrategy(
        integer_fitness,
        optimizer=eggroll.threshold(0.1),
        population_size=64,
        sigma=None,
        shaping="pair_sign",
        perturbation=perturbation,
    )


def integer_params() -> dict:
    first, head = jax.random.split(jax.random.key(0))
    shapes = ((first, (128, 128)), (head, (128, 64)))
    return dict(
        zip(("first", "head"), (jax.random.randint(key, shape, -40, 41).astype(jnp.int8) for key, shape in shapes), strict=True)
    )


def integer_batch() -> tuple:
    x = jax.random.randint(jax.random.key(3), (4, 128), -60, 61).astype(jnp.int8)
    return x, jax.random.randint(jax.random.key(4), (4, 64), -60, 61)


def integer_generation(implementation: str | None) -> tuple:
    """Fitness [N] and the parameters after it."""
    es = integer_strategy(implementation)
    state, metrics = es.step(es.init(integer_params(), key=jax.random.key(1)), integer_batch())
    return metrics.fitness, state.params
