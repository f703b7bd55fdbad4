"""Checked access to the fields of a checkpoint's config.json."""

from collections.abc import Mapping
from typing import Any


def require(fields: Mapping[str, Any], name: str) -> Any:
    """Return a field.

    Raises:
        ValueError: config.json has no such field.
    """
    if fields.get(name) is None:
        raise ValueError(f"config.json of model_type '{fields.get('model_type')}' has no '{name}'.")
    return fields[name]


def integer(fields: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """Return a field that must be an integer >= 1; `default` where config.json leaves it out.

    Raises:
        ValueError: it is missing without a default, or something else.
    """
    value = default if default is not None and fields.get(name) is None else require(fields, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"'{name}' in config.json must be an integer >= 1, got {value!r}.")
    return value


def check_supported(fields: Mapping[str, Any], name: str, expected: Any) -> None:
    """Raise ValueError if a field has another value than the only supported one."""
    if fields.get(name, expected) != expected:
        model = fields.get("model_type")
        raise ValueError(f"'{name}' is {fields[name]!r} in config.json, but '{model}' supports only {expected!r}.")
