"""The families of models that checkpoints are read as, by the model_type of their config.json."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from experiments.models import opt, transformer, transformer_cache, transformer_fields
from experiments.models.decoder import Decoder
from experiments.models.generator import Generator
from experiments.models.leaves import Leaves

Config = opt.OPTConfig | transformer.TransformerConfig


class Family(NamedTuple):
    """Functions of a family's configurations.

    Args:
        from_fields, to_fields: config.json to a configuration and back.
        leaves: the table of parameters.
        decoder: the functions of whole texts.
        generator: the functions that continue texts; None: there are none.
    """

    from_fields: Callable[[Mapping[str, Any]], Any]
    to_fields: Callable[[Any], dict[str, Any]]
    leaves: Callable[[Any], Leaves]
    decoder: Callable[[Any], Decoder]
    generator: Callable[[Any], Generator] | None


_TRANSFORMER = Family(
    transformer_fields.from_fields,
    transformer_fields.to_fields,
    transformer.leaves,
    transformer.decoder,
    transformer_cache.generator,
)
FAMILIES: dict[str, Family] = {
    "opt": Family(opt.from_fields, opt.to_fields, opt.leaves, opt.decoder, None),
    **dict.fromkeys(transformer.MODEL_TYPES, _TRANSFORMER),
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
