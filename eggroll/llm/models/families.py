"""The families of models that checkpoints are read as, by the model_type of their config.json."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from eggroll.llm.decoder import Decoder
from eggroll.llm.generator import Generator
from eggroll.llm.models import opt, rwkv7, rwkv7_fields, transformer, transformer_cache, transformer_fields
from eggroll.llm.models.leaves import Leaves

Config = opt.OPTConfig | transformer.TransformerConfig | rwkv7.RWKV7Config


class Family(NamedTuple):
    """Functions of a family's configurations.

    Args:
        from_fields, to_fields: config.json to a configuration and back.
        leaves: the table of parameters.
        decoder: the functions of whole texts.
        generator: the functions that continue texts; None: there are none.
        observed: a configuration and the names of a file's tensors to the configuration of that file.
        harmless: pattern of tensors that a file may have beside those of the table, since they change nothing.
    """

    from_fields: Callable[[Mapping[str, Any]], Any]
    to_fields: Callable[[Any], dict[str, Any]]
    leaves: Callable[[Any], Leaves]
    decoder: Callable[[Any], Decoder]
    generator: Callable[[Any], Generator] | None
    observed: Callable[[Any, Iterable[str]], Any] = lambda config, tensors: config
    harmless: str = r".*\.rotary_emb\.inv_freq"


_TRANSFORMER = Family(
    transformer_fields.from_fields,
    transformer_fields.to_fields,
    transformer.leaves,
    transformer.decoder,
    transformer_cache.generator,
)
_RWKV7 = Family(
    rwkv7_fields.from_fields,
    rwkv7_fields.to_fields,
    rwkv7_fields.leaves,
    rwkv7.decoder,
    rwkv7.generator,
    rwkv7_fields.observed,
    r"blocks\.0\.att\.v[012]",
)
FAMILIES: dict[str, Family] = {
    "opt": Family(opt.from_fields, opt.to_fields, opt.leaves, opt.decoder, None, harmless=r"(model\.)?decoder\.version"),
    **dict.fromkeys(transformer.MODEL_TYPES, _TRANSFORMER),
    "rwkv7": _RWKV7,
}


def family_of(config: Config) -> Family:
    """Return the family of a configuration."""
    return FAMILIES[config.model_type]


def decoder(config: Config) -> Decoder:
    """Return the functions of whole texts of the model that `config` describes."""
    return family_of(config).decoder(config)


def generator(config: Config) -> Generator:
    """Return the functions with which the model that `config` describes continues texts.

    Raises:
        ValueError: the family does not continue texts.
    """
    make = family_of(config).generator
    if make is None:
        able = ", ".join(name for name, family in FAMILIES.items() if family.generator)
        raise ValueError(f"model_type must be one of {able} to continue texts, got '{config.model_type}'.")
    return make(config)
