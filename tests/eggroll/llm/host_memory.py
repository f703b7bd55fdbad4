"""Load and save a model, and measure the memory of the process: `python -m tests.eggroll.llm.host_memory SOURCE WEIGHTS OUT`.

Prints MiB as JSON: the model, its largest tensor, its largest stacked parameter, and the peak above what the imports take.
"""

import functools
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors  # noqa: F401  the baseline contains it

from eggroll.llm import export, hf
from eggroll.llm.models.families import family_of, init_params
from eggroll.llm.models.transformer import TransformerConfig
from eggroll.llm.stacks import stored_tensors

BILLION = TransformerConfig(32000, 2048, 5632, 22, 32, 4, 64, model_type="llama")  # the sizes of TinyLlama
SHARD = 1_000_000_000


def tensors_of(config, dtype=jnp.bfloat16):
    """The tensors of a model of random numbers between -2 and 2, drawn when they are written."""
    shapes = jax.eval_shape(lambda: init_params(config, key=jax.random.key(0), dtype=dtype))
    rng = np.random.default_rng(0)

    def draw(tensor):
        bits = rng.integers(0, 1 << 16, tensor.shape, np.uint16)
        yield (bits & 0xBFFF).view(tensor.dtype)  # the second bit of the exponent is 0

    tensors = stored_tensors(family_of(config).leaves(config), shapes)
    return [tensor._replace(pieces=functools.partial(draw, tensor)) for tensor in tensors]


def write_random(folder, config):
    """Write a checkpoint of random bfloat16 numbers, tensor by tensor."""
    fields = family_of(config).to_fields(config) | {"dtype": "bfloat16"}
    folder.mkdir()
    files = {"config.json": json.dumps(fields).encode()}
    export.replace_checkpoint(folder, tensors_of(config), files, max_shard_bytes=SHARD)


def peak():
    """The most memory that this process has had, in MiB; `ru_maxrss` begins at that of the parent."""
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def main(source, weights, out):
    jnp.zeros(1).block_until_ready()
    before = peak()
    config, _, params = hf.load(source, jnp.bfloat16, weights=weights)
    loaded = peak() - before
    hf.save(out, config, params, max_shard_bytes=SHARD)
    arrays = jax.tree.leaves(params)
    found = {
        "model": sum(array.nbytes for array in arrays),
        "tensor": max(tensor.nbytes for tensor in stored_tensors(family_of(config).leaves(config), params)),
        "stack": max(array.nbytes for array in arrays),
    }
    print(json.dumps({name: count / (1 << 20) for name, count in found.items()} | {"loaded": loaded, "saved": peak() - before}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
