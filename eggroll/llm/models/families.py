"""The supported families of models, by the model_type of a config.json."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from eggroll.llm.decoder import Decoder
from eggroll.llm.generator import Generator
from eggroll.llm.models import opt, rwkv7, rwkv7_fields, transformer
from eggroll.llm.models.leaves import Leaves, init

Config = opt.OPTConfig | transformer.TransformerConfig | rwkv7.RWKV7Config


class Family(NamedTuple):
    """Functions of a family's configurations.

    Args:
        from_fields, to_fields: convert config.json to a configuration and back.
        leaves: the table of parameters.
        make_decoder: makes the functions of whole texts.
        make_generator: makes the functions that continue texts; None: not supported.
        detect_names: adapts a configuration to the naming scheme of a file's tensors.
        ignored_tensors: pattern of further tensors that a file may have, because they have no effect.
    """

    from_fields: Callable[[Mapping[str, Any]], Any]
    to_fields: Callable[[Any], dict[str, Any]]
    leaves: Callable[[Any], Leaves]
    make_decoder: Callable[[Any], Decoder]
    make_generator: Callable[[Any], Generator] | None
    detect_names: Callable[[Any, Iterable[str]], Any] = lambda config, tensors: config
    ignored_tensors: str = r".*\.rotary_emb\.inv_freq"


_TRANSFORMER = Family(
    transformer.from_fields,
    transformer.to_fields,
    transformer.leaves,
    transformer.make_decoder,
    transformer.make_generator,
)
_RWKV7 = Family(
    rwkv7_fields.from_fields,
    rwkv7_fields.to_fields,
    rwkv7_fields.leaves,
    rwkv7.make_decoder,
    rwkv7.make_generator,
    rwkv7_fields.detect_names,
    r"blocks\.0\.att\.v[012]",
)
FAMILIES: dict[str, Family] = {
    "opt": Family(
        opt.from_fields, opt.to_fields, opt.leaves, opt.make_decoder, None, ignored_tensors=r"(model\.)?decoder\.version"
    ),
    **dict.fromkeys(transformer.MODEL_TYPES, _TRANSFORMER),
    "rwkv7": _RWKV7,
}


def family_of(config: Config) -> Family:
    """Return the family of a configuration."""
    return FAMILIES[config.model_type]


def init_params(config: Config, *, key: Array, dtype: DTypeLike = jnp.float32) -> Any:
    """Draw initial parameters of the model that `config` describes.

    Args:
        config: of the model.
        key: typed key, consumed.
        dtype: of every parameter.

    Returns:
        {"resident": {...}, "blocks": {...}}, blocks stacked along a leading axis of layers.
    """
    return init(family_of(config).leaves(config), key, dtype)


def make_decoder(config: Config) -> Decoder:
    """Make the functions of whole texts for the model that `config` describes."""
    return family_of(config).make_decoder(config)


def make_generator(config: Config) -> Generator:
    """Make the functions that continue texts for the model that `config` describes.

    Raises:
        ValueError: the family cannot continue texts.
    """
    make = family_of(config).make_generator
    if make is None:
        able = ", ".join(name for name, family in FAMILIES.items() if family.make_generator)
        raise ValueError(f"model_type must be one of {able} to continue texts, got '{config.model_type}'.")
    return make(config)
