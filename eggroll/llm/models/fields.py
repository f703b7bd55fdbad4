"""Fields of a checkpoint's config.json, and what of them a model of ours takes."""

from collections.abc import Mapping
from typing import Any


def required(fields: Mapping[str, Any], name: str) -> Any:
    """Return a field.

    Raises:
        ValueError: config.json has no such field.
    """
    if fields.get(name) is None:
        raise ValueError(f"config.json of model_type '{fields.get('model_type')}' has no '{name}'.")
    return fields[name]


def integers(fields: Mapping[str, Any], *names: str) -> dict[str, int]:
    """Return fields that must be integers >= 1.

    Raises:
        ValueError: one of them is absent or something else.
    """
    for name in names:
        value = required(fields, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"'{name}' in config.json must be an integer >= 1, got {value!r}.")
    return {name: fields[name] for name in names}


def only(fields: Mapping[str, Any], name: str, expected: Any) -> None:
    """Raise ValueError where a field is there with another value than the one that we support."""
    if fields.get(name, expected) != expected:
        model = fields.get("model_type")
        raise ValueError(f"'{name}' is {fields[name]!r} in config.json, and of '{model}' only {expected!r} is supported.")
