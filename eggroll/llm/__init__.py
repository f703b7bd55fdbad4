r"""Language models: Hugging Face checkpoints, tokenizers, chat templates, and decoding, also of a whole population at once.

    config, decoder, params = llm.load("Qwen2.5-0.5B")            Llama, Qwen2, Qwen3, RWKV-7; OPT without decoding
    tokenizer = llm.load_tokenizer("Qwen2.5-0.5B", vocab_size=config.vocab_size)
    llm.save("tuned", config, params, source="Qwen2.5-0.5B")      transformers reads it

A model with random parameters that reads bytes, and two members of a population that complete the same prompt:

    >>> import eggroll, jax, optax
    >>> from eggroll import llm
    >>> config = llm.TransformerConfig(257, 16, 48, 1, 2, 2, head_dim=8)
    >>> generator, prompts = llm.make_generator(config), llm.pad_prompts([[256, *b"2+2="]], length=8)
    >>> def complete(params, prompts):
    ...     return llm.complete(generator, params, prompts, max_new_tokens=3, stop_token_ids=b"\n")
    >>> es = eggroll.EvolutionStrategy(None, population_size=2, sigma=0.1, optimizer=optax.sgd(0.1))
    >>> state = es.init(llm.init_params(config, key=jax.random.key(0)), key=jax.random.key(1))
    >>> es.ask(state).apply(complete, prompts).tokens.shape     # [N, B, max_new_tokens]
    (2, 1, 3)

The engine does not import this package. Checkpoints and tokenizers need the extra `llm`, chat templates
the extra `chat`; both are imported when they are used.
"""

from eggroll.llm.chat import ChatTemplate
from eggroll.llm.decoder import Decoder, apply, hidden_states, token_log_likelihood
from eggroll.llm.decoding import Completions, Prompts, complete, pad_prompts
from eggroll.llm.generator import Generator
from eggroll.llm.hf import load, read_config, save
from eggroll.llm.memory import MemoryPlan, memory_plan
from eggroll.llm.models.families import Config, init_params, make_decoder, make_generator
from eggroll.llm.models.opt import OPTConfig
from eggroll.llm.models.rotary import Rotary
from eggroll.llm.models.rwkv7 import RWKV7Config
from eggroll.llm.models.transformer import TransformerConfig
from eggroll.llm.tokenizers import ByteTokenizer, FileTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "ByteTokenizer",
    "ChatTemplate",
    "Completions",
    "Config",
    "Decoder",
    "FileTokenizer",
    "Generator",
    "MemoryPlan",
    "OPTConfig",
    "Prompts",
    "RWKV7Config",
    "Rotary",
    "Tokenizer",
    "TransformerConfig",
    "apply",
    "complete",
    "hidden_states",
    "init_params",
    "load",
    "load_tokenizer",
    "make_decoder",
    "make_generator",
    "memory_plan",
    "pad_prompts",
    "read_config",
    "save",
    "token_log_likelihood",
]
