"""Checked access to the fields of a checkpoint's config.json, which may contain anything."""

from collections.abc import Mapping
from typing import Any

LARGEST = 2**31 - 1  # of a size
FLOAT32 = 3.4e38  # of a number


def shorten(value: Any) -> str:
    """A value as part of an error message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."


def require(fields: Mapping[str, Any], name: str) -> Any:
    """Return a field.

    Raises:
        ValueError: config.json has no such field.
    """
    if fields.get(name) is None:
        raise ValueError(f"config.json of model_type '{fields.get('model_type')}' has no '{name}'.")
    return fields[name]


def integer(fields: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """Return a field that must be an integer from 1 to `LARGEST`; `default` where config.json leaves it out.

    Raises:
        ValueError: it is missing without a default, or something else.
    """
    value = default if default is not None and fields.get(name) is None else require(fields, name)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST:
        limit = ", below 2^31" if isinstance(value, int) and value > LARGEST else ""
        raise ValueError(f"'{name}' in config.json must be an integer >= 1{limit}, got {shorten(value)}.")
    return value


def number(fields: Mapping[str, Any], name: str, default: float) -> float:
    """Return a field that must be a finite number > 0; `default` where config.json leaves it out.

    Raises:
        ValueError: it is something else.
    """
    value = default if fields.get(name) is None else fields[name]
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < FLOAT32:
        raise ValueError(f"'{name}' in config.json must be a finite number > 0, got {shorten(value)}.")
    return value


def flag(fields: Mapping[str, Any], name: str, default: bool) -> bool:
    """Return a field that must be true or false; `default` where config.json leaves it out.

    Raises:
        ValueError: it is something else.
    """
    value = default if fields.get(name) is None else fields[name]
    if not isinstance(value, bool):
        raise ValueError(f"'{name}' in config.json must be true or false, got {shorten(value)}.")
    return value


def check_supported(fields: Mapping[str, Any], name: str, expected: Any) -> None:
    """Raise ValueError if a field has another value than the only supported one."""
    value = fields.get(name, expected)
    if value != expected or isinstance(value, bool) != isinstance(expected, bool):
        model = fields.get("model_type")
        raise ValueError(f"'{name}' is {shorten(value)} in config.json, but '{model}' supports only {expected!r}.")
