"""Sampling text from the byte model. The host samples in floating point; the model itself stays in integers."""

import functools

import jax
import numpy as np

from eggroll.experiments.egg.models import egg

_step = functools.partial(jax.jit, static_argnames="config")(egg.step)


def sample(
    params: egg.Params, config: egg.Config, prompt: bytes, *, length: int, temperature: float = 1.0, seed: int = 0
) -> bytes:
    """Continue a document.

    Args:
        params: as `egg.init` returns them.
        config: the model's.
        prompt: the beginning of the document; may be empty.
        length: bytes to sample.
        temperature: 0 takes the likeliest byte, 1 samples from the model's probabilities.
        seed: of the samples.

    Returns:
        The sampled bytes; a separator among them begins a new document.

    Raises:
        ValueError: a negative length or temperature.
    """
    if length < 0:
        raise ValueError(f"length must be >= 0, got {length}.")
    if not temperature >= 0:
        raise ValueError(f"temperature must be >= 0, got {temperature}.")
    generator, state, drawn = np.random.default_rng(seed), egg.init_state(config), bytearray()
    for byte in (egg.SEPARATOR, *prompt):
        logits, state = _step(params, state, np.uint8(byte), config)
    for _ in range(length):
        drawn.append(_draw(np.asarray(logits, np.float64), temperature, generator))
        logits, state = _step(params, state, np.uint8(drawn[-1]), config)
    return bytes(drawn)


def _draw(logits: np.ndarray, temperature: float, generator: np.random.Generator) -> int:
    if temperature == 0:
        return int(np.argmax(logits))
    weights = 2 ** ((logits - logits.max()) / (16 * temperature))
    return int(generator.choice(len(weights), p=weights / weights.sum()))
