"""Small language models of every family, and how tests run them and compare them with transformers."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eggroll.llm import hf
from eggroll.llm.decoder import apply
from eggroll.llm.models import leaves, opt
from eggroll.llm.models.families import family_of
from eggroll.llm.models.rotary import Rotary
from eggroll.llm.models.rwkv7 import RWKV7Config
from eggroll.llm.models.transformer import TransformerConfig

OPT = opt.OPTConfig(50, 16, 3, 32, 4, 20, word_embed_proj_dim=16)
QWEN3 = TransformerConfig(50, 16, 24, 3, 4, 2, 6, rotary=Rotary(500.0))
LLAMA = TransformerConfig(50, 16, 24, 3, 4, 4, 4, model_type="llama", rms_norm_eps=1e-5)
QWEN2 = TransformerConfig(50, 16, 24, 3, 4, 2, 4, model_type="qwen2", max_position_embeddings=64)
LLAMA3 = Rotary(500.0, "llama3", factor=8.0, original_max_position_embeddings=16, low_freq_factor=1.0, high_freq_factor=4.0)
YARN = Rotary(500.0, "yarn", factor=4.0, original_max_position_embeddings=16)
TRANSFORMERS = {
    "qwen3": QWEN3,
    "qwen3-tied": dataclasses.replace(QWEN3, tie_word_embeddings=True),
    "qwen3-bias": dataclasses.replace(QWEN3, attention_bias=True),
    "qwen3-yarn": dataclasses.replace(QWEN3, rotary=dataclasses.replace(YARN, mscale=1.5, mscale_all_dim=0.7, truncate=False)),
    "qwen2": QWEN2,
    "qwen2-tied": dataclasses.replace(QWEN2, tie_word_embeddings=True),
    "qwen2-yarn": dataclasses.replace(QWEN2, rotary=dataclasses.replace(YARN, beta_fast=4.0, beta_slow=0.5)),
    "llama": LLAMA,
    "llama-bias": dataclasses.replace(LLAMA, attention_bias=True, mlp_bias=True),
    "llama-tied-llama3": dataclasses.replace(LLAMA, rotary=LLAMA3, num_key_value_heads=1, head_dim=8, tie_word_embeddings=True),
    "llama-linear": dataclasses.replace(LLAMA, rotary=Rotary(500.0, "linear", factor=2.5)),
}
RWKV7 = RWKV7Config(50, 16, 24, 3, 5, 6, 7, 9, head_dim=8)
DECODING = {name: TRANSFORMERS[name] for name in ("qwen3", "qwen2-yarn", "llama-tied-llama3")} | {"rwkv7": RWKV7}


@functools.cache
def _values(config):
    """Random values of every parameter, none of them trivial, as float32 of numpy; the spread of a matrix is that of `init`."""
    generator, table = np.random.default_rng(0), family_of(config).leaves(config)

    def drawn(leaf, shape):
        spread = 0.2 if leaf.start != "matrix" else (0.04 + 1 / leaf.shape[0]) ** 0.5
        return leaves.CONSTANTS.get(leaf.start, 0.0) + spread * generator.standard_normal(shape, np.float32)

    resident = {name: drawn(leaf, leaf.shape) for name, leaf in table.resident.items()}
    return {
        "resident": resident,
        "blocks": {name: drawn(leaf, (table.layers, *leaf.shape)) for name, leaf in table.blocks.items()},
    }


def save_without_sums(folder, config):
    """Save random parameters as others do, for tests that edit the files."""
    (hf.save(folder, config, random_params(config)) / "SHA256SUMS").unlink()
    return folder


def random_params(config, dtype=jnp.float32):
    """Parameters of a model, all of them random."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf.astype(dtype)), _values(config))


def inputs(length=11, left=False):
    """Two texts, the second padded by four tokens, on the right or on the left."""
    tokens = np.random.default_rng(0).integers(3, 50, (2, length)).astype(np.int32)
    mask = np.ones((2, length), bool)
    mask[1, :4] = not left
    mask[1, length - 4 :] = left
    return tokens, mask


def logits_of(config, params, tokens, mask):
    return np.asarray(_logits(config, params, tokens, mask))


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, tokens, mask):
    return apply(hf.make_decoder(config), params, tokens, mask)


@functools.partial(jax.jit, static_argnums=0, static_argnames="length")
def greedy(config, params, tokens, mask, *, length):
    """The likeliest tokens, int32 [B, length], and the logits they are of, [length, B, V]; a scan over tokens."""
    generator = hf.make_generator(config)
    first, cache = generator.prefill(params, tokens, mask, length)

    def one(carry, _):
        logits, cache = carry
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return generator.step(params, cache, token), (token, logits)

    _, (chosen, logits) = jax.lax.scan(one, (first, cache), None, length=length)
    return chosen.T, logits


@contextlib.contextmanager
def reference(folder):
    """The model of a folder in transformers."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield torch, transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def reference_logits(folder, tokens, mask):
    with reference(folder) as (torch, model):
        return model(torch.tensor(tokens), attention_mask=torch.tensor(mask.astype(np.int64))).logits.numpy()


def moved(torch, model):
    """Give a model of transformers the same random parameters every time, biases and norms too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(parameter.ndim == 1)  # what it was made with differs from run to run
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


CHATML = (
    "{% for message in messages %}\n<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_checkpoint(folder, *, chat_template=CHATML):
    """Write a random Qwen2 of transformers with its tokenizer; return the tokenizer."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    tokenizer = write_tokenizer(folder, chat_template=chat_template)
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512)
    config = transformers.Qwen2Config(**sizes, eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    transformers.utils.logging.disable_progress_bar()
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    return tokenizer


def write_tokenizer(folder, *, chat_template):
    """Write a byte-level tokenizer with the special tokens of a chat; return it as transformers has it."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["make the number out of the numbers, what is the answer"] * 5, trainer)
    known = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "chat_template": chat_template}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **known)
    tokenizer.save_pretrained(folder)
    return tokenizer
